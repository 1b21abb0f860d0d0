"""The skip connection of a transcoder: a linear map from what is read to what is rebuilt, beside the latents.

It is whole on every rank, like b_dec: all compute the same update from the same batch, 4 batch x d_in x d_out floating
point operations and 12 bytes an element. It is fp32, whatever the other weights are.
"""

import torch
from jaxtyping import Float
from sae_kernels.reference import adam_
from sae_kernels.row_state import Hyper
from torch import Tensor

from sae_dist.sae.variants.interface import W_SKIP


class Skip:
    """y_hat has (x - centre) W_skip besides what the latents give; 0 before step 0."""

    def __init__(self, W_skip: Float[Tensor, "d_in d_out"], *, centre: Float[Tensor, " d_in"]) -> None:
        self.value, self._centre = W_skip.detach().float().clone(), centre
        self._first, self._second = (torch.zeros_like(self.value) for _ in range(2))

    def of(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """Its part of the reconstruction."""
        return (x.float() - self._centre) @ self.value

    def gradient(
        self, x: Float[Tensor, "batch d_in"], errors: Float[Tensor, "batch d_out"], *, scale: float
    ) -> Float[Tensor, "d_in d_out"]:
        """d loss / d W_skip, of a loss with d loss / d y_hat = scale * errors."""
        return (x.float() - self._centre).t() @ (scale * errors)

    def update_(self, gradient: Float[Tensor, "d_in d_out"], hyper: Hyper) -> None:
        """Adam."""
        adam_(self.value, gradient, self._first, self._second, **hyper._asdict())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that share memory with this object; equal on all ranks."""
        name = W_SKIP.name
        return {name: self.value, f"first.{name}": self._first, f"second.{name}": self._second}

    def load_(self, tensors: dict[str, Tensor]) -> None:
        """Copies in what `state_dict` named, and takes it out of `tensors`."""
        for name, own in self.state_dict().items():
            own.copy_(tensors.pop(name))
