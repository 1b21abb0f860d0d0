"""BatchTopK (Bussmann et al. 2024)."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, TensorSpec, TopOfBatch, check_counts

THRESHOLD = TensorSpec("threshold", ("n_latents",), units="target", role="tracked")


@frozen
class BatchTopK:
    """BatchTopK with AuxK (Bussmann et al. 2024): the batch * k largest pre-activations of a batch are active.

    At inference, latents above one threshold are active: the running mean of each batch's smallest chosen value.
    """

    kind: Literal["batchtopk"] = "batchtopk"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32  # latents a token, in the mean
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*AUTOENCODER, THRESHOLD)

    @property
    def rule(self) -> TopOfBatch:
        return TopOfBatch(self.k)
