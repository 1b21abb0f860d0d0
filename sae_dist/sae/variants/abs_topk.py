"""AbsTopK: latents with a sign."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, TensorSpec, Top, check_counts


@frozen
class AbsTopK:
    """AbsTopK with AuxK: the k pre-activations of every token that are largest by size are active, with their sign.

    One latent then stands for a direction and its opposite, which TopK needs two for. Encoding takes two products.
    """

    kind: Literal["abs_topk"] = "abs_topk"
    n_latents: Annotated[int, Field(ge=1)] = 16_384
    k: Annotated[int, Field(ge=1)] = 32
    k_aux: Annotated[int, Field(ge=0)] | None = None  # null: the power of two below d_model / 2; 0: no AuxK
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    dead_after_tokens: Annotated[int, Field(ge=1)] = 10_000_000

    def __post_init__(self) -> None:
        check_counts(self.n_latents, self.k, self.k_aux)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return AUTOENCODER

    @property
    def rule(self) -> Top:
        return Top(self.k, signed=True)
