"""Evaluates dictionaries on held-out text, spliced into the language model.

All dictionaries of a hook point are evaluated together: the clean model runs once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.loss_recovered import LossRecovered, loss_recovered
from sae_dist.evaluate.metrics import LOSS, Metrics, measured, unmeasured
from sae_dist.model.load import LanguageModel
from sae_dist.sae.dictionary import Dictionary
from sae_dist.text.stream import TokenStream


def evaluate_loss(
    dictionaries: Sequence[Dictionary],
    language_model: LanguageModel,
    hook: str,
    *,
    stream: TokenStream,
    positions: Callable[
        [Int[Tensor, "batch context"], Float[Tensor, "batch context d_model"]], Bool[Tensor, "batch context"]
    ],
    mean: Float[Tensor, " d_model"],
    config: EvaluateConfig,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Metrics]:
    """Each one's figures that need the model: its cross-entropy clean, spliced, zero-ablated and mean-ablated."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        ids = stream.spread(config.ce_sequences)
        for start in range(0, len(ids), config.batch_sequences):
            found = stream.sequences(ids[start : start + config.batch_sequences])
            yield torch.as_tensor(found.tokens), torch.as_tensor(found.counted)

    found = loss_recovered(
        language_model, hook, batches=batches(), positions=positions, mean=mean, progress=progress,
        reconstruct=[partial(_rebuilt, dictionary) for dictionary in dictionaries],
    )  # fmt: skip
    return [loss_figures(one) for one in found]


def _rebuilt(dictionary: Dictionary, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    return dictionary.reconstruct(rows.float())


def loss_figures(found: LossRecovered) -> Metrics:
    """The metrics by name; null with a reason where there was no token to predict or no loss to recover."""
    if not found.tokens:
        return unmeasured(LOSS, "the held-out text has no token to predict") | {"ce_tokens": 0}
    shares = {
        "zero ablation": ("loss_recovered", found.loss_recovered),
        "mean ablation": ("loss_recovered_mean", found.loss_recovered_mean),
    }
    return measured(
        {
            "ce_tokens": found.tokens,
            "ce_clean": found.ce_clean,
            "ce_spliced": found.ce_spliced,
            "ce_zero_ablated": found.ce_zero_ablated,
            "ce_mean_ablated": found.ce_mean_ablated,
            **dict(shares.values()),
        },
        {
            name: f"{ablation} does not change the cross-entropy"
            for ablation, (name, share) in shares.items()
            if share is None
        },
    )
