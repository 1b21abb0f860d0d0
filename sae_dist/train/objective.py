"""The loss of a step, for one rank and for a mesh, and how its gradient reaches the pairs.

    loss = [ sum ||x - x_hat||^2 + w sum ||e - e_hat||^2 ] / (batch variance) + P(mean over rows of their pairs' cost)

where a kind may have several nested x_hat with weights (Nested), or a second one whose decoder is constant (frozen).

The first term is the fraction of variance that x_hat = b_dec + sum_j value_j W_dec[j] leaves unexplained, the second
AuxK (w is `sae_kernels.reference.aux_weight`), the third the kind's penalty on activity. Kernels compute the gradient
of the first two, d loss / d value = scale errors . W_dec[j]. The map from z to a value is elementwise, so autograd over
batch x L0 numbers does the rest.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from sae_kernels.reference import Selected
from torch import Tensor

from sae_dist.sae.variants.interface import CostlySilence, Elementwise, Rescaled

OwnVectors = Mapping[str, Float[Tensor, "..."]]  # the latents' own vectors, at each pair's latent


class PairValues(NamedTuple):
    """What the decoder multiplies, and what activity costs."""

    values: Float[Tensor, "lines places"]  # 0 at empty places
    cost: Float[Tensor, " sums"]  # the sum of all costs and, where the kind has it, that of what they are worth; fp64
    frozen: Float[Tensor, "lines places"] | None = None  # of the second reconstruction


class PairGradients(NamedTuple):
    """The values of pairs, and the gradients of the loss with respect to z and the latents' own vectors."""

    values: Float[Tensor, "lines places"]
    d_z: Float[Tensor, "lines places"]
    d_own: dict[str, Float[Tensor, "lines places"]]


def pair_values(maths: Elementwise, z: Selected, own: OwnVectors) -> PairValues:
    """The value at every place, and the sum of all costs, in one call of the kind's mathematics."""
    with torch.no_grad():
        values, cost, frozen = maths.activate(z.values, own)
        summed = [torch.zeros_like(values) if cost is None else cost]
        if isinstance(maths, Rescaled):
            summed.append(maths.worth(z.values, own))
    totals = torch.stack([torch.where(z.there, each, 0.0).double().sum() for each in summed])
    return PairValues(
        torch.where(z.there, values, 0.0), totals, None if frozen is None else torch.where(z.there, frozen, 0.0)
    )


def pair_gradients(
    maths: Elementwise, z: Selected, own: OwnVectors, d_values: Float[Tensor, "lines places"],
    d_frozen: Float[Tensor, "lines places"] | None, *, price: float | Tensor,
) -> PairGradients:  # fmt: skip
    """d loss / d z and d loss / d own, from d loss / d value and `price` = d loss / d cost of a pair.

    `d_frozen`: of the values of the second reconstruction. All results are 0 at empty places.
    """
    chosen = z.there
    with torch.enable_grad():
        leaf = z.values.detach().requires_grad_()
        of_own = {name: vector.detach().requires_grad_() for name, vector in own.items()}
        values, cost, frozen = maths.activate(leaf, of_own)
        loss = (torch.where(chosen, values, 0.0) * d_values).sum()
        if frozen is not None and d_frozen is not None:
            loss = loss + (torch.where(chosen, frozen, 0.0) * d_frozen).sum()
        if cost is not None:
            loss = loss + price * torch.where(chosen, cost, 0.0).sum()
        d_z, *d_own = torch.autograd.grad(loss, [leaf, *of_own.values()], materialize_grads=True)
    return PairGradients(
        torch.where(chosen, values.detach(), 0.0), torch.where(chosen, d_z, 0.0),
        {name: torch.where(chosen, d, 0.0) for name, d in zip(of_own, d_own, strict=True)},
    )  # fmt: skip


class SilenceGradients(NamedTuple):
    """What the cost of silence gives to every latent, per unit of a row's mean cost."""

    cost: Float[Tensor, ""]  # the sum over these latents, fp64
    d_mean_z: Float[Tensor, " n_latents"]
    d_own: dict[str, Float[Tensor, " n_latents"]]


def silence_gradients(kind: CostlySilence, mean_z: Float[Tensor, " n_latents"], own: OwnVectors) -> SilenceGradients:
    """The cost of all latents as if they were silent on all rows, and its gradients."""
    with torch.enable_grad():
        leaf = mean_z.detach().requires_grad_()
        of_own = {name: vector.detach().requires_grad_() for name, vector in own.items()}
        cost = kind.silence(leaf, of_own).double().sum()
        d_mean_z, *d_own = torch.autograd.grad(cost, [leaf, *of_own.values()], materialize_grads=True)
    return SilenceGradients(cost.detach(), d_mean_z, dict(zip(of_own, d_own, strict=True)))
