"""Keys that several kinds have, with what follows from them alone: sizes and AuxK, a k that falls, an L1 price."""

import dataclasses
from typing import Annotated, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import Above, Penalty, check_counts, linear


@frozen
class Sized:
    """The keys of every kind: its size, and AuxK for dead latents (Gao et al. 2024, App. A.2)."""

    n_latents: Annotated[int, Field(ge=1)] = 16_384  # the width of the dictionary
    k: Annotated[int, Field(ge=1)] = 32  # active latents a token
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32  # of AuxK in the loss
    # a latent silent for so many tokens is dead; null: for a tenth of those trained on, at most 10 million
    dead_after_tokens: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)


@frozen
class FallingK(Sized):
    """A k that begins higher and falls in a straight line."""

    k_start: Annotated[int, Field(ge=1)] | None = None  # k at the first step, which falls to k; null: k
    k_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2  # of the steps, until it has fallen

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.n_latents, self.k_start or self.k, self.k_aux, name="k_start")

    def at(self, progress: float) -> Self:
        if self.k_start is None:
            return self
        k = round(linear(progress, start=self.k_start, end=self.k, over=self.k_fraction))
        return dataclasses.replace(self, k=k, k_start=None)


@frozen
class ByRowsFirst(Sized):
    """First steps that choose within rows.

    While latents are nearly random, the largest pre-activations of a batch are those of a few rows. The features of all
    other rows are then learned by nobody, and the latents that could learn them are not dead, so AuxK does not help.
    """

    # of the steps, first: the k largest of every row are active, not those of the batch
    rows_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2


@frozen
class AboveLevel(Sized):
    """All latents above a level, of which about k are active before step 0."""

    k: Annotated[int, Field(ge=1)] = 32  # latents a token before step 0: b_enc begins so that no more are active

    @property
    def rule(self) -> Above:
        return Above(self.k)


@frozen
class L1(AboveLevel):
    """A price of activity that is linear and rises from 0.

    It is coefficient * cost in the units of papers that scale x to a squared norm of d_model, here about its mean: with
    x of unit deviation u = sqrt(variance / width), values are measured in u and errors in u^2.
    """

    l1_coefficient: Annotated[float, Field(ge=0)] = 2.0  # the price of activity
    l1_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # of the steps, in which the coefficient rises from 0

    def at(self, progress: float) -> Self:
        risen = linear(progress, start=0, end=self.l1_coefficient, over=self.l1_fraction)
        return dataclasses.replace(self, l1_coefficient=risen)

    def penalty(self, mean: Float[Tensor, ""], *, variance: float, width: int) -> Penalty:
        slope = mean.new_tensor(self.l1_coefficient / (variance * width) ** 0.5)
        return Penalty(slope * mean, slope)
