"""AbsTopK: latents with a sign."""

from typing import Literal

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, TensorSpec, Top
from sae_dist.sae.variants.keys import Sized


@frozen
class AbsTopK(Sized):
    """AbsTopK with AuxK: the k pre-activations of every token that are largest by size are active, with their sign.

    One latent then stands for a direction and its opposite, which TopK needs two for. Encoding takes two products.
    """

    kind: Literal["abs_topk"] = "abs_topk"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return AUTOENCODER

    @property
    def rule(self) -> Top:
        return Top(self.k, signed=True)
