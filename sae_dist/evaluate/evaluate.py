"""One dictionary judged on held-out text: from the store's held-out units, and in the running model."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.loss_recovered import loss_recovered
from sae_dist.evaluate.reconstruction import reconstruction
from sae_dist.model.load import LanguageModel
from sae_dist.sae.dictionary import Dictionary
from sae_dist.shards.reader import Store, heldout
from sae_dist.text.stream import TokenStream

Figures = dict[str, Any]


def evaluate_reconstruction(dictionary: Dictionary, store: Store, hook: str, config: EvaluateConfig) -> Figures:
    """The figures that need no model: FVU, L0, cosine and dead share on the units that training never reads."""
    rows = (batch.x for batch in heldout(store, hook, config.batch_rows))
    found = reconstruction(dictionary, rows)
    return {
        "tokens": found.tokens,
        "fvu": found.fvu,
        "l0": found.l0,
        "dead_fraction": found.dead_fraction,
        "cosine": found.cosine,
        "density_quantiles": density_quantiles(found.density),
    }


def evaluate_loss(
    dictionary: Dictionary,
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
) -> Figures:
    """The figures that need the model: its cross-entropy clean, spliced, zero-ablated and mean-ablated."""

    def batches() -> Iterator[Tensor]:
        n = min(config.ce_sequences, stream.n_sequences)  # evenly over the stream: neighbours are of one document
        ids = np.linspace(0, stream.n_sequences - 1, n).round().astype(np.int64)
        for start in range(0, len(ids), config.batch_sequences):
            yield torch.as_tensor(stream.sequences(ids[start : start + config.batch_sequences]).tokens)

    found = loss_recovered(
        language_model, hook, batches=batches(), positions=positions, mean=mean, progress=progress,
        reconstruct=lambda rows: dictionary.decode(dictionary.encode(rows.float())),
    )  # fmt: skip
    return {
        "ce_tokens": found.tokens,
        "ce_clean": found.ce_clean,
        "ce_spliced": found.ce_spliced,
        "ce_zero_ablated": found.ce_zero_ablated,
        "ce_mean_ablated": found.ce_mean_ablated,
        "loss_recovered": found.loss_recovered,
        "loss_recovered_mean": found.loss_recovered_mean,
    }


RECONSTRUCTION_FIGURES = ("tokens", "fvu", "l0", "dead_fraction", "cosine", "density_quantiles")
LOSS_FIGURES = (
    "ce_tokens", "ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated",
    "loss_recovered", "loss_recovered_mean",
)  # fmt: skip
UNMEASURED: Figures = dict.fromkeys((*RECONSTRUCTION_FIGURES, *LOSS_FIGURES))  # null: not measured, never a guess


def density_quantiles(density: Float[Tensor, " n_latents"]) -> dict[str, float]:
    """Quantiles over the latents of the share of rows on which each is active."""
    points = (0.01, 0.1, 0.5, 0.9, 0.99)
    values = np.quantile(density.numpy(), points)  # torch.quantile stops at 16M latents
    return {f"{point:g}": float(value) for point, value in zip(points, values, strict=True)}
