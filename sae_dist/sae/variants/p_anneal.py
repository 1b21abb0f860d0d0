"""ReLU with an L_p penalty whose p falls from 1 (Karvonen et al. 2024)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import Activated, linear
from sae_dist.sae.variants.relu import ReLU

LEAST = 1e-3  # of a value, in the units of scaled rows: the slope of f^p has no bound at 0, that of (f + LEAST)^p has


@frozen
class PAnneal(ReLU):
    """ReLU + L_p, p falling from 1 (Karvonen et al. 2024): the price nears L0, which does not shrink large values.

    ||x - x_hat||^2 + l1_coefficient s sum_j f_j^p, where s makes the penalty what it is with p = 1. The paper finds s
    at every change of p from the batches before; here it is that of the batch, a constant in the gradient.
    """

    kind: Literal["p_anneal"] = "p_anneal"  # type: ignore[assignment]
    p_end: Annotated[float, Field(gt=0, le=1)] = 0.2
    p_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0  # of the steps, in which p falls in a straight line

    def at(self, progress: float) -> Self:
        p = linear(progress, start=1, end=self.p_end, over=self.p_fraction)
        return dataclasses.replace(super().at(progress), p_end=p)

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:  # noqa: ARG002
        return Activated(z, cost=(z + LEAST).pow(self.p_end) - LEAST**self.p_end)

    def worth(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Float[Tensor, "..."]:  # noqa: ARG002
        return z
