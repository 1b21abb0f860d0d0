"""Gated (Rajamanoharan et al. 2024a)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import (
    AUTOENCODER,
    Above,
    Activated,
    Penalty,
    TensorSpec,
    check_counts,
    l1_penalty,
    linear,
)


@frozen
class Gated:
    """Gated: one encoder says how strong a latent is, a second one, tied to it, whether it is active.

    f = relu(z) where the gate pi = exp(log_gain) (z - threshold) is positive: the paper's pair of tied encoders
    (sec. 3.2, eq. 7), with z as the magnitude. Only the gate pays:
    ||x - x_hat||^2 + l1_coefficient sum_j relu(pi_j) + ||x - x_hat_frozen(relu(pi))||^2 (eq. 8). A finished one is a
    JumpReLU dictionary.
    """

    kind: Literal["gated"] = "gated"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32  # latents a token before step 0
    l1_coefficient: Annotated[float, Field(ge=0)] = 2.0
    l1_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # of the steps, in which the coefficient rises from 0
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        threshold = TensorSpec("threshold", ("n_latents",), units="target", minimum=0.0)
        return (*AUTOENCODER, threshold, TensorSpec("log_gain", ("n_latents",), exported=False))

    @property
    def rule(self) -> Above:
        return Above(self.k)

    def at(self, progress: float) -> Self:
        risen = linear(progress, start=0, end=self.l1_coefficient, over=self.l1_fraction)
        return dataclasses.replace(self, l1_coefficient=risen)

    def start(self, level: float) -> Mapping[str, float]:
        """Gate and magnitude begin equal, where k latents are active."""
        return {"b_enc": -level, "threshold": 0.0, "log_gain": 0.0}

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> Float[Tensor, " n_latents"]:
        return own["threshold"]

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:
        gate = own["log_gain"].exp() * (z - own["threshold"])  # positive at every pair
        return Activated(z.relu(), cost=gate, frozen=gate)

    def penalty(self, mean: Float[Tensor, ""], *, variance: float, width: int) -> Penalty:
        return l1_penalty(mean, coefficient=self.l1_coefficient, variance=variance, width=width)
