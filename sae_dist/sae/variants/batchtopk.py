"""BatchTopK (Bussmann et al. 2024)."""

import dataclasses
from typing import Annotated, Literal, Self

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, THRESHOLD, TensorSpec, TopOfBatch, check_counts, linear


@frozen
class BatchTopK:
    """BatchTopK with AuxK (Bussmann et al. 2024): the batch * k largest pre-activations of a batch are active.

    At inference, latents above one threshold are active: the running mean of each batch's smallest chosen value.
    """

    kind: Literal["batchtopk"] = "batchtopk"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32  # latents a token, in the mean
    k_start: Annotated[int, Field(ge=1)] | None = None  # k at the first step, which falls to k; null: k
    k_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2  # of the steps, until it has fallen
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)
        check_counts(self.n_latents, self.k_start or self.k, self.k_aux, name="k_start")

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*AUTOENCODER, THRESHOLD)

    @property
    def rule(self) -> TopOfBatch:
        return TopOfBatch(self.k)

    def at(self, progress: float) -> Self:
        if self.k_start is None:
            return self
        k = round(linear(progress, start=self.k_start, end=self.k, over=self.k_fraction))
        return dataclasses.replace(self, k=k, k_start=None)
