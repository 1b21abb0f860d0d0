"""ReLU with an L1 penalty that is weighted by decoder norms (Templeton et al. 2024)."""

from collections.abc import Mapping
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import FREE_AUTOENCODER, NORM, THRESHOLD, Activated, TensorSpec
from sae_dist.sae.variants.relu import ReLU


@frozen
class ReLUNorm(ReLU):
    """ReLU + norm-weighted L1 as in Scaling Monosemanticity (Templeton et al. 2024); decoder rows of any norm.

    ||x - x_hat||^2 + l1_coefficient sum_j f_j ||W_dec[j]||, where the mean of ||x - mean||^2 is d_model: scaling a
    latent's encoder up and its decoder down changes nothing. Recipe of April 2024: train.clip_norm=1.
    """

    kind: Literal["relu_norm"] = "relu_norm"  # type: ignore[assignment]
    l1_coefficient: Annotated[float, Field(ge=0)] = 5.0  # the price of activity

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (*FREE_AUTOENCODER, THRESHOLD)

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:
        return Activated(z, cost=z * own[NORM])
