"""TopK (Gao et al. 2024)."""

from typing import Literal

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, TensorSpec, Top
from sae_dist.sae.variants.keys import FallingK


@frozen
class TopK(FallingK):
    """TopK with AuxK (Gao et al. 2024): the k largest pre-activations of every token are active."""

    kind: Literal["topk"] = "topk"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return AUTOENCODER

    @property
    def rule(self) -> Top:
        return Top(self.k)
