"""Gated (Rajamanoharan et al. 2024a)."""

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.sae.variants.interface import AUTOENCODER, Activated, TensorSpec
from sae_dist.sae.variants.keys import L1


@frozen
class Gated(L1):
    """Gated: one encoder says how strong a latent is, a second one, tied to it, whether it is active.

    f = relu(z) where the gate pi = exp(log_gain) (z - threshold) is positive: the paper's pair of tied encoders
    (sec. 3.2, eq. 7), with z as the magnitude. Only the gate pays:
    ||x - x_hat||^2 + l1_coefficient sum_j relu(pi_j) + ||x - x_hat_frozen(relu(pi))||^2 (eq. 8). A finished one is a
    JumpReLU dictionary.
    """

    kind: Literal["gated"] = "gated"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        threshold = TensorSpec("threshold", ("n_latents",), units="z", minimum=0.0)
        return (*AUTOENCODER, threshold, TensorSpec("log_gain", ("n_latents",), exported=False))

    def start(self, level: float) -> Mapping[str, float]:
        """Gate and magnitude begin equal, where k latents are active."""
        return {"b_enc": -level, "threshold": 0.0, "log_gain": 0.0}

    def level(self, own: Mapping[str, Float[Tensor, " n_latents"]]) -> Float[Tensor, " n_latents"]:
        return own["threshold"]

    def activate(self, z: Float[Tensor, "..."], own: Mapping[str, Float[Tensor, "..."]]) -> Activated:
        gate = own["log_gain"].exp() * (z - own["threshold"])  # positive at every pair
        return Activated(z.relu(), cost=gate, frozen=gate)
