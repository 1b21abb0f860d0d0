"""Metrics of a reconstruction, from sums that can be added over batches and ranks."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ReconstructionSums(NamedTuple):
    """Sums over rows, in fp64: adding two of them gives the sums over both sets of rows."""

    rows: int
    x: Float[Tensor, " d_model"]  # sum x
    squared_norm: Float[Tensor, ""]  # sum ||x||^2
    squared_error: Float[Tensor, ""]  # sum ||x - x_hat||^2
    cosine: Float[Tensor, ""]  # sum cos(x, x_hat)
    fired: Int[Tensor, " n_latents"]  # rows on which a latent is active

    def __add__(self, other: "ReconstructionSums") -> "ReconstructionSums":  # type: ignore[override]
        return ReconstructionSums(
            rows=self.rows + other.rows,
            x=self.x + other.x,
            squared_norm=self.squared_norm + other.squared_norm,
            squared_error=self.squared_error + other.squared_error,
            cosine=self.cosine + other.cosine,
            fired=self.fired + other.fired,
        )


class Reconstruction(NamedTuple):
    """The metrics of a reconstruction."""

    tokens: int
    fvu: float
    l0: float
    cosine: float
    dead_fraction: float
    density: Float[Tensor, " n_latents"]  # share of rows on which a latent is active


def sums(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    *,
    active: Int[Tensor, " active"],
    n_latents: int,
) -> ReconstructionSums:
    """The sums of one batch; `active` are the active latents of all rows, in any order."""
    x, x_hat = x.double(), x_hat.double()
    return ReconstructionSums(
        rows=x.shape[0],
        x=x.sum(0),
        squared_norm=x.square().sum(),
        squared_error=(x - x_hat).square().sum(),
        cosine=torch.cosine_similarity(x, x_hat, dim=-1).sum(),
        fired=torch.bincount(active, minlength=n_latents),
    )


def figures(total: ReconstructionSums) -> Reconstruction:
    """FVU = sum ||x - x_hat||^2 / sum ||x - mean(x)||^2: 0 is perfect, 1 is the mean. L0 = mean active latents a row.

    dead_fraction is the share of latents that are active on none of the rows.
    """
    variance = total.squared_norm - total.x.square().sum() / total.rows
    return Reconstruction(
        tokens=total.rows,
        fvu=float(total.squared_error / variance),
        l0=float(total.fired.sum() / total.rows),
        cosine=float(total.cosine / total.rows),
        dead_fraction=float((total.fired == 0).double().mean()),
        density=total.fired / total.rows,
    )
