"""JumpReLU (Rajamanoharan et al. 2024) with a target for the number of active latents."""

from collections.abc import Mapping
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field
from sae_kernels import reference
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, Above, Activated, Penalty, TensorSpec
from sae_dist.sae.variants.keys import Sized


@frozen
class JumpReLU(Sized):
    """JumpReLU with AuxK: a latent is active where its pre-activation exceeds a threshold that it learns.

    value = z H(z - theta), and l0_coefficient (L0 / k - 1)^2 is added to the loss (Rajamanoharan et al. 2024, sec. 3
    and App. F, in fractions of k). Gradients of a threshold come from pairs within half a bandwidth of it.
    """

    kind: Literal["jumprelu"] = "jumprelu"
    k: Annotated[int, Field(ge=1)] = 32  # latents a token, in the mean: the target
    l0_coefficient: Annotated[float, Field(ge=0)] = 1.0  # of the penalty for missing it
    bandwidth: Annotated[float, Field(gt=0)] = 1.0  # in the units of scaled rows, whose mean squared norm is d_model
    threshold_rate: Annotated[float, Field(gt=0)] = 10.0  # times train.lr: thresholds are far larger than weights

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        threshold = TensorSpec("threshold", ("n_latents",), units="z", lr_factor=self.threshold_rate, minimum=0.0)
        return (*AUTOENCODER, threshold)

    @property
    def rule(self) -> Above:
        return Above(self.k)

    def start(self, level: float) -> Mapping[str, float]:
        """All thresholds at the level where k latents of a row are active; thresholds of 0 would be dense."""
        return {"threshold": level}

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> Float[Tensor, " n_latents"]:
        return (own["threshold"] - self.bandwidth / 2).clamp_min(0)

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:
        return Activated(*reference.jumprelu(z, own["threshold"], bandwidth=self.bandwidth))

    def penalty(self, mean: Float[Tensor, ""], *, variance: float, width: int) -> Penalty:  # noqa: ARG002
        excess = mean / self.k - 1
        return Penalty(self.l0_coefficient * excess.square(), 2 * self.l0_coefficient * excess / self.k)
