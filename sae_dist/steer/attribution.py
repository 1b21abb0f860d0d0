"""Which latents made a number what it is: activation times gradient, and what zeroing a latent really changes.

The number is a `score` of the activations that the dictionary rebuilds, such as the difference of two logits. The
error, which the dictionary does not explain, is held throughout.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from sae_kernels import Active
from torch import Tensor

from sae_dist.model.hooks import PreTrainedModel, replace

Score = Callable[[Float[Tensor, "rows width"]], Float[Tensor, ""]]


class Attribution(NamedTuple):
    """For every active latent of every row: an estimate of what the score loses without it."""

    rows: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    effects: Float[Tensor, " n"]

    def of_latents(self) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Each latent once, with the sum of its effects; largest first, by size."""
        latents, place = self.latents.unique(return_inverse=True)
        total = self.effects.new_zeros(len(latents)).index_add_(0, place, self.effects)
        order = total.abs().argsort(descending=True, stable=True)
        return latents[order], total[order]


def attribute(
    score: Score,
    x: Float[Tensor, "rows width"],
    active: Active,
    W_dec: Float[Tensor, "n_latents width"],
    *,
    steps: int = 0,
) -> Attribution:
    """value x (decoder row . gradient of the score at x).

    With `steps`, the gradient is its mean over so many points between x with all its latents at zero and x (integrated
    gradients): the effects then sum to the difference of the score between both, as `steps` grows.
    """
    rows, latents, values = active.rows, active.indices, active.values
    explained = torch.zeros_like(x).index_add_(0, rows, values[:, None] * W_dec[latents])
    shares = [1.0] if steps == 0 else [(step + 0.5) / steps for step in range(steps)]
    gradient = torch.zeros_like(x)
    for share in shares:
        gradient += _gradient(score, x - (1 - share) * explained) / len(shares)
    return Attribution(rows, latents, values, values * (W_dec[latents] * gradient[rows]).sum(1))


def ablate(
    score: Score,
    x: Float[Tensor, "rows width"],
    active: Active,
    W_dec: Float[Tensor, "n_latents width"],
    latents: Sequence[int],
) -> Float[Tensor, " m"]:
    """What the score loses when each of these latents alone is zero on all rows."""
    with torch.no_grad():
        whole, lost = score(x), []
        for latent in latents:
            here = active.indices == latent
            without = x.index_add(0, active.rows[here], -active.values[here, None] * W_dec[latent])
            lost.append(whole - score(without))
    return torch.stack(lost) if lost else x.new_zeros(0)


def logit_difference(
    model: PreTrainedModel, hook: str, tokens: Int[Tensor, " context"], logits: Sequence[int]
) -> Score:
    """The last position's logit of the first of `logits` less that of the second; less the mean of all if it is alone.

    As a score of the activations [context, width] at `hook`.
    """
    first, *others = logits

    def score(x: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
        with replace(model, {hook: lambda _: x[None]}):
            last = model(input_ids=tokens[None], use_cache=False).logits[0, -1].float()
        return last[first] - (last[others[0]] if others else last.mean())

    return score


def _gradient(score: Score, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(score(leaf), leaf)[0].detach()


def rank_correlation(a: Float[Tensor, " m"], b: Float[Tensor, " m"]) -> float | None:
    """Spearman's; None where there are fewer than three values, or where all of one side are equal."""
    if len(a) < 3:
        return None
    ranks = torch.stack([_ranks(values) for values in (a, b)])
    return None if bool((ranks.std(1) == 0).any()) else float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Twice the rank of each, less one; equal values share the mean of theirs."""
    ordered, values = values.sort().values, values.contiguous()
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double()
