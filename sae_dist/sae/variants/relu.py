"""ReLU with an L1 penalty (Bricken et al. 2023)."""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, THRESHOLD, Activated, TensorSpec
from sae_dist.sae.variants.keys import L1


@frozen
class ReLU(L1):
    """ReLU + L1 as in Towards Monosemanticity (Bricken et al. 2023): unit decoder rows, x - b_dec is encoded.

    ||x - x_hat||^2 + l1_coefficient sum_j f_j, where the mean of ||x - mean||^2 is d_model. The paper takes the mean
    over dimensions in the first term: its coefficient times d_model is this one.
    """

    kind: Literal["relu"] = "relu"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*AUTOENCODER, THRESHOLD)

    def start(self, level: float) -> Mapping[str, float]:
        """b_enc where k latents are active: with 0, half of all would be, which no sparse step can hold."""
        return {"b_enc": -level}

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> None:  # noqa: ARG002
        return None

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:  # noqa: ARG002
        return Activated(z, cost=z)
