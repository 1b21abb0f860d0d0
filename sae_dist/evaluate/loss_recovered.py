"""The model's cross-entropy with a reconstruction spliced in, compared with clean and ablated runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_dist.model.hooks import replace
from sae_dist.model.load import LanguageModel
from sae_dist.model.logits import next_token_loss


class LossRecovered(NamedTuple):
    """Mean cross-entropy in nats a token, over the same predicted tokens in all four runs; NaN where there are none."""

    tokens: int
    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    ce_mean_ablated: float

    @property
    def loss_recovered(self) -> float | None:
        """(ce_zero_ablated - ce_spliced) / (ce_zero_ablated - ce_clean): 1 is the model itself, 0 the ablation.

        None where the ablation costs nothing, so that there is nothing to recover.
        """
        return self._share(self.ce_zero_ablated)

    @property
    def loss_recovered_mean(self) -> float | None:
        """The same with mean ablation, which is a stricter baseline."""
        return self._share(self.ce_mean_ablated)

    def _share(self, ablated: float) -> float | None:
        return (ablated - self.ce_spliced) / (ablated - self.ce_clean) if ablated != self.ce_clean else None


def loss_recovered(
    language_model: LanguageModel,
    hook: str,
    *,
    batches: Iterable[tuple[Int[Tensor, "_ context"], Bool[Tensor, "_ context"]]],
    positions: Callable[
        [Int[Tensor, "batch context"], Float[Tensor, "batch context width"]], Bool[Tensor, "batch context"]
    ],
    reconstruct: Sequence[Callable[[Float[Tensor, "rows width"]], Float[Tensor, "rows width"]]],
    mean: Float[Tensor, " width"],
    progress: Callable[[int], None] = lambda _: None,
) -> list[LossRecovered]:
    """Runs each batch three times, clean, with zeros and with the training mean, and once for each of `reconstruct`.

    A batch is tokens and which of them count. Of these, `positions(tokens, x)` says where to intervene: where a harvest
    would make rows. Elsewhere (the first position of a sequence and norm outliers, which the dictionary has never seen)
    x stays as it is in all runs.
    """

    def fill(values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda rows: values.to(rows).expand_as(rows)

    def splice(rebuilt: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda rows: rebuilt(rows.cpu()).to(rows)

    interventions: list[Callable[[Tensor], Tensor] | None] = [
        None,
        fill(torch.zeros_like(mean)),
        fill(mean),
        *map(splice, reconstruct),
    ]
    totals, n_tokens = [0.0] * len(interventions), 0
    for tokens, counted in batches:
        for i, intervention in enumerate(interventions):
            edits = {} if intervention is None else {hook: _where(partial(positions, tokens), counted, intervention)}
            with replace(language_model.model, edits):
                losses = next_token_loss(language_model.model, tokens.to(language_model.model.device))
            totals[i] += float(losses.double().sum())
        n_tokens += tokens.shape[0] * (tokens.shape[1] - 1)
        progress(n_tokens)
    clean, zero, mean_ablated, *spliced = (total / n_tokens if n_tokens else math.nan for total in totals)
    return [LossRecovered(n_tokens, clean, own, zero, mean_ablated) for own in spliced]


def _where(
    positions: Callable[[Tensor], Tensor],
    counted: Bool[Tensor, "batch context"],
    intervention: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    def edit(x: Float[Tensor, "batch context width"]) -> Float[Tensor, "batch context width"]:
        mask, edited = (positions(x.cpu()) & counted).to(x.device), x.clone()
        edited[mask] = intervention(x[mask])
        return edited

    return edit
