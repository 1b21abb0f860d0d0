"""BatchTopK (Bussmann et al. 2024)."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, THRESHOLD, TensorSpec, TopOfBatch
from sae_dist.sae.variants.keys import ByRowsFirst, FallingK


@frozen
class BatchTopK(FallingK, ByRowsFirst):
    """BatchTopK with AuxK (Bussmann et al. 2024): the batch * k largest pre-activations of a batch are active.

    At inference, latents above one threshold are active: the running mean of each batch's smallest chosen value.
    """

    kind: Literal["batchtopk"] = "batchtopk"
    k: Annotated[int, Field(ge=1)] = 32  # latents a token, in the mean

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*AUTOENCODER, THRESHOLD)

    @property
    def rule(self) -> TopOfBatch:
        return TopOfBatch(self.k)
