"""Evaluates dictionaries on held-out data: the store's held-out units, and held-out text in the model.

All dictionaries of a hook point are evaluated together: rows are read once, and the clean model runs once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.loss_recovered import LossRecovered, loss_recovered
from sae_dist.evaluate.metrics import LOSS, RECONSTRUCTION, Metrics, measured, merged, unmeasured
from sae_dist.evaluate.reconstruction import is_constant, reconstruction
from sae_dist.model.load import LanguageModel
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.metrics import ReconstructionSums, figures
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.reader import Store, heldout_pairs
from sae_dist.text.stream import TokenStream


def evaluate_reconstruction(
    dictionaries: Sequence[Dictionary], store: Store, hooks: Hooks, config: EvaluateConfig
) -> list[Metrics]:
    """Each one's figures that need no model: FVU, L0, cosine and dead share on the units that training never reads.

    FVU and cosine are those of what is rebuilt: of a transcoder, the rows of its target.
    """
    if not store.meta.heldout_units:
        return [unmeasured(RECONSTRUCTION, "the store has no held-out units")] * len(dictionaries)
    totals = reconstruction(dictionaries, heldout_pairs(store, hooks, config.batch_rows))
    if totals is None:
        none = unmeasured(RECONSTRUCTION, "the held-out units have no rows that are finite") | {"tokens": 0}
        return [none] * len(dictionaries)
    return [reconstruction_figures(total) for total in totals]


def reconstruction_figures(total: ReconstructionSums) -> Metrics:
    """What the sums say, by name; null with a reason where all rows are the same."""
    found, constant = figures(total), is_constant(total)
    return measured(
        {
            "tokens": found.tokens,
            "fvu": None if constant else found.fvu,
            "l0": found.l0,
            "dead_fraction": found.dead_fraction,
            "cosine": found.cosine,
            "density_quantiles": density_quantiles(found.density),
        },
        {
            "fvu": f"the {found.tokens} held-out rows are all the same"
            if constant
            else "the reconstruction is not finite"
        },
    )


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

    def batches() -> Iterator[Tensor]:
        n = min(config.ce_sequences, stream.n_sequences)  # evenly over the stream: neighbours are of one document
        ids = np.linspace(0, stream.n_sequences - 1, n).round().astype(np.int64)
        for start in range(0, len(ids), config.batch_sequences):
            yield torch.as_tensor(stream.sequences(ids[start : start + config.batch_sequences]).tokens)

    found = loss_recovered(
        language_model, hook, batches=batches(), positions=positions, mean=mean, progress=progress,
        reconstruct=[partial(_rebuilt, dictionary) for dictionary in dictionaries],
    )  # fmt: skip
    return [loss_figures(one) for one in found]


def _rebuilt(dictionary: Dictionary, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    return dictionary.decode(dictionary.encode(rows.float()))


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


UNMEASURED = merged(unmeasured(RECONSTRUCTION, "not judged yet"), unmeasured(LOSS, "there is no language model to run"))


def density_quantiles(density: Float[Tensor, " n_latents"]) -> dict[str, float]:
    """Quantiles over the latents of the share of rows on which each is active."""
    points = (0.01, 0.1, 0.5, 0.9, 0.99)
    values = np.quantile(density.numpy(), points)  # torch.quantile stops at 16M latents
    return {f"{point:g}": float(value) for point, value in zip(points, values, strict=True)}
