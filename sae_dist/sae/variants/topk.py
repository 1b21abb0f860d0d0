"""TopK (Gao et al. 2024)."""

import dataclasses
from typing import Annotated, Literal, Self

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, TensorSpec, Top, check_counts, linear


@frozen
class TopK:
    """TopK with AuxK (Gao et al. 2024): the k largest pre-activations of every token are active."""

    kind: Literal["topk"] = "topk"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32
    k_start: Annotated[int, Field(ge=1)] | None = None  # k at the first step, which falls to k; null: k
    k_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2  # of the steps, until it has fallen
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000  # a latent silent for this long is dead

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)
        check_counts(self.n_latents, self.k_start or self.k, self.k_aux, name="k_start")

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return AUTOENCODER

    @property
    def rule(self) -> Top:
        return Top(self.k)

    def at(self, progress: float) -> Self:
        if self.k_start is None:
            return self
        k = round(linear(progress, start=self.k_start, end=self.k, over=self.k_fraction))
        return dataclasses.replace(self, k=k, k_start=None)
