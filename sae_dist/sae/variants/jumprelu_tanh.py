"""JumpReLU with a tanh penalty and a loss on silent pre-activations (Anthropic, January 2025)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import (
    FREE_AUTOENCODER,
    NORM,
    Activated,
    Penalty,
    TensorSpec,
)
from sae_dist.sae.variants.keys import AboveLevel


@frozen
class JumpReLUTanh(AboveLevel):
    """JumpReLU as in the Circuits Update of January 2025: a latent is active where z exceeds a threshold it learns.

    ||x - x_hat||^2 + tanh_coefficient sum_j tanh(c f_j ||W_dec[j]||) + silence_coefficient sum_j relu(theta_j - z_j)
    ||W_dec[j]||, where the mean of ||x - mean||^2 is d_model. The last term draws silent latents back: it is linear in
    z, so that its sum over silent pairs is that over all less that over active ones. The step at the threshold has the
    slope 1 / bandwidth within half a bandwidth, for all parameters.
    """

    kind: Literal["jumprelu_tanh"] = "jumprelu_tanh"
    tanh_coefficient: Annotated[float, Field(ge=0)] = 10.0  # rises from 0 over all steps
    tanh_scale: Annotated[float, Field(gt=0)] = 4.0  # c, in the tanh
    silence_coefficient: Annotated[float, Field(ge=0)] = 3e-6
    bandwidth: Annotated[float, Field(gt=0)] = 2.0
    initial_threshold: Annotated[float, Field(gt=0)] = 0.1
    threshold_rate: Annotated[float, Field(gt=0)] = 1.0  # times train.lr

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        threshold = TensorSpec("threshold", ("n_latents",), units="z", lr_factor=self.threshold_rate, minimum=0.0)
        return (*FREE_AUTOENCODER, threshold)

    def at(self, progress: float) -> Self:
        return dataclasses.replace(self, tanh_coefficient=self.tanh_coefficient * progress)

    def start(self, level: float) -> Mapping[str, float]:
        """b_enc where k latents are above the initial threshold."""
        return {"b_enc": self.initial_threshold - level, "threshold": self.initial_threshold}

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> Float[Tensor, " n_latents"]:
        return own["threshold"].clamp_min(0) - self.bandwidth / 2

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:
        norm, above = own[NORM], z - own["threshold"].clamp_min(0)
        ramp = (above / self.bandwidth + 0.5).clamp(0, 1)
        step = ramp + ((above > 0).to(z.dtype) - ramp).detach()  # a step forward, a ramp's slope backward
        values = z * step
        cost = self.tanh_coefficient * (self.tanh_scale * values * norm).tanh()
        # Of an active pair there is no silence, which `silence` counts for all.
        return Activated(values, cost=cost + (above > 0) * self.silence_coefficient * above * norm)

    def silence(
        self, mean_z: Float[Tensor, " n_latents"], own: Mapping[str, Float[Tensor, " n_latents"]]
    ) -> Float[Tensor, " n_latents"]:
        return self.silence_coefficient * (own["threshold"].clamp_min(0) - mean_z) * own[NORM]

    def penalty(self, mean: Float[Tensor, ""], *, variance: float, width: int) -> Penalty:  # noqa: ARG002
        slope = mean.new_tensor(1 / width)  # costs are counts, nearly
        return Penalty(slope * mean, slope)
