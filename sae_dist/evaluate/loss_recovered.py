"""What a dictionary keeps of the model's loss: cross-entropy with the reconstruction spliced into the running model."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_dist.model.hooks import replace
from sae_dist.model.load import LanguageModel
from sae_dist.model.logits import next_token_loss


class LossRecovered(NamedTuple):
    """Mean cross-entropy in nats a token, over the same predicted tokens in all four runs."""

    tokens: int
    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    ce_mean_ablated: float

    @property
    def loss_recovered(self) -> float:
        """(ce_zero_ablated - ce_spliced) / (ce_zero_ablated - ce_clean): 1 is the model itself, 0 the ablation."""
        return (self.ce_zero_ablated - self.ce_spliced) / (self.ce_zero_ablated - self.ce_clean)

    @property
    def loss_recovered_mean(self) -> float:
        """The same against mean ablation, the harder yardstick."""
        return (self.ce_mean_ablated - self.ce_spliced) / (self.ce_mean_ablated - self.ce_clean)


def loss_recovered(
    language_model: LanguageModel,
    hook: str,
    *,
    batches: Iterable[tuple[Int[Tensor, "batch context"], Bool[Tensor, "batch context"]]],
    reconstruct: Callable[[Float[Tensor, "rows width"]], Float[Tensor, "rows width"]],
    mean: Float[Tensor, " width"],
    progress: Callable[[int], None] = lambda _: None,
) -> LossRecovered:
    """Runs each batch four times: clean, reconstruction spliced in, zeros, and the training mean.

    `batches` are (tokens, which positions to intervene on). Positions that never become rows (the first of a sequence,
    whose massive activation the dictionary has not seen) stay as they are in all four runs.
    """

    def fill(values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda rows: values.to(rows.dtype).expand_as(rows)

    interventions: tuple[Callable[[Tensor], Tensor] | None, ...] = (
        None,
        lambda rows: reconstruct(rows).to(rows.dtype),
        fill(torch.zeros_like(mean)),
        fill(mean),
    )
    totals, n_tokens = [0.0] * len(interventions), 0
    for tokens, positions in batches:
        for i, intervention in enumerate(interventions):
            edits = {} if intervention is None else {hook: _at(positions, intervention)}
            with replace(language_model.model, edits):
                totals[i] += float(next_token_loss(language_model.model, tokens).double().sum())
        n_tokens += tokens.shape[0] * (tokens.shape[1] - 1)
        progress(n_tokens)
    return LossRecovered(n_tokens, *(total / n_tokens for total in totals))


def _at(
    positions: Bool[Tensor, "batch context"], intervention: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def edit(x: Float[Tensor, "batch context width"]) -> Float[Tensor, "batch context width"]:
        edited = x.clone()
        edited[positions] = intervention(x[positions])
        return edited

    return edit
