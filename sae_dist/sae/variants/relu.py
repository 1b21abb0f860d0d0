"""ReLU with an L1 penalty (Bricken et al. 2023)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import (
    AUTOENCODER,
    THRESHOLD,
    Above,
    Activated,
    Penalty,
    TensorSpec,
    check_counts,
    l1_penalty,
    linear,
)


@frozen
class ReLU:
    """ReLU + L1 as in Towards Monosemanticity (Bricken et al. 2023): unit decoder rows, x - b_dec is encoded.

    ||x - x_hat||^2 + l1_coefficient sum_j f_j, where the mean of ||x - mean||^2 is d_model. The paper takes the mean
    over dimensions in the first term: its coefficient times d_model is this one.
    """

    kind: Literal["relu"] = "relu"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32  # latents a token before step 0: b_enc begins so that no more are active
    l1_coefficient: Annotated[float, Field(ge=0)] = 2.0
    l1_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # of the steps, in which the coefficient rises from 0
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*AUTOENCODER, THRESHOLD)

    @property
    def rule(self) -> Above:
        return Above(self.k)

    def at(self, progress: float) -> Self:
        risen = linear(progress, start=0, end=self.l1_coefficient, over=self.l1_fraction)
        return dataclasses.replace(self, l1_coefficient=risen)

    def start(self, level: float) -> Mapping[str, float]:
        """b_enc where k latents are active: with 0, half of all would be, which no sparse step can hold."""
        return {"b_enc": -level}

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> None:  # noqa: ARG002
        return None

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:  # noqa: ARG002
        return Activated(z, cost=z)

    def penalty(self, mean: Float[Tensor, ""], *, variance: float, width: int) -> Penalty:
        return l1_penalty(mean, coefficient=self.l1_coefficient, variance=variance, width=width)
