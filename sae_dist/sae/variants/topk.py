"""TopK (Gao et al. 2024)."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, TensorSpec, Top, check_counts


@frozen
class TopK:
    """TopK with AuxK (Gao et al. 2024): the k largest pre-activations of every token are active."""

    kind: Literal["topk"] = "topk"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000  # a latent silent for this long is dead

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return AUTOENCODER

    @property
    def rule(self) -> Top:
        return Top(self.k)
