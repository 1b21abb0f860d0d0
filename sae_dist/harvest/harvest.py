"""One unit of text through the model: tokens in, rows out. Who calls it and where rows go is the service's business."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt32, UInt64
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.rows import eligible, keep
from sae_dist.model.hooks import capture
from sae_dist.model.load import LanguageModel
from sae_dist.text.stream import Sequences
from sae_dist.text.tokenize import separator


class Rows(NamedTuple):
    """The rows of one unit: row i of every hook point is the same token."""

    states: dict[str, Float[Tensor, "rows width"]]
    doc: UInt64[np.ndarray, " rows"]
    pos: UInt32[np.ndarray, " rows"]
    token: Int64[np.ndarray, " rows"]
    positions: int  # positions run through the model
    nonfinite: int
    outliers: int


def harvest(
    language_model: LanguageModel, hooks: Sequence[str], *, sequences: Sequences, config: HarvestConfig
) -> Rows:
    """Runs the sequences through the model in one pass for all hook points and keeps the rows that the policy keeps.

    Batches never reach across units, so a unit's rows do not depend on which replica harvested it, or when.
    """
    tokens = torch.as_tensor(sequences.tokens)
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for batch in tokens.split(config.batch_sequences):
        for hook, x in capture(language_model.model, batch.to(language_model.model.device), hooks).items():
            parts[hook].append(x.cpu())
    states = {hook: torch.cat(xs) for hook, xs in parts.items()}
    candidates = eligible(tokens, config.rows, separator(language_model.tokenizer))
    kept = keep(states, candidates, config.rows)
    if kept.nonfinite > config.max_nonfinite_fraction * tokens.numel():
        raise UserError(
            f"{kept.nonfinite} of {tokens.numel()} positions of {language_model.name} are NaN or Inf at "
            f"{', '.join(hooks)}; load it in float32 (model.dtype=float32) or raise harvest.max_nonfinite_fraction"
        )
    return Rows(
        states={hook: x[kept.mask] for hook, x in states.items()},
        doc=sequences.doc[kept.mask.numpy()],
        pos=sequences.pos[kept.mask.numpy()],
        token=sequences.tokens[kept.mask.numpy()],
        positions=tokens.numel(),
        nonfinite=kept.nonfinite,
        outliers=kept.outliers,
    )
