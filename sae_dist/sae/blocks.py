"""Cross-layer dictionaries: latents of layer l read hook point l alone, and write hook points l, l + 1, ...

Latents are shared out to layers in equal parts, in their order. Matrices are stored whole, as wide as all hook points
side by side. What lies outside of the blocks is 0, and stays exactly 0 because its gradient is 0 in every step: Adam
moves it nowhere, and the norm of a row does not know it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Blocks(NamedTuple):
    """The widths of the hook points that are read and written, as many of each, and the number of all latents."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    n_latents: int

    def layer(self, latents: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        """The layer of each of these latents, numbered within the whole dictionary."""
        return latents * len(self.reads) // self.n_latents

    def enc_(self, rows: Float[Tensor, "some d_in"], latents: Int[Tensor, " some"]) -> Float[Tensor, "some d_in"]:
        """Sets what these latents do not read to 0, in place."""
        return _keep_(rows, self.reads, self.layer(latents)[:, None] == _numbers(self.reads, latents))

    def dec_(self, rows: Float[Tensor, "some d_out"], latents: Int[Tensor, " some"]) -> Float[Tensor, "some d_out"]:
        """Sets what these latents do not write to 0, in place."""
        return _keep_(rows, self.writes, self.layer(latents)[:, None] <= _numbers(self.writes, latents))


def _numbers(widths: tuple[int, ...], like: Tensor) -> Int[Tensor, " sites"]:
    return torch.arange(len(widths), device=like.device)


def _keep_(rows: Tensor, widths: tuple[int, ...], kept: Bool[Tensor, "some sites"]) -> Tensor:
    for number, site in enumerate(rows.split(widths, 1)):
        site.masked_fill_(~kept[:, number, None], 0)
    return rows
