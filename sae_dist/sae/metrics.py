"""Metrics of a reconstruction, from sums that can be added over batches and ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ReconstructionSums(NamedTuple):
    """Sums over rows, in fp64: adding two of them gives the sums over both sets of rows."""

    rows: int
    x: Float[Tensor, " d_model"]  # sum x
    squared_norm: Float[Tensor, " sites"]  # sum ||x||^2, of each of the hook points side by side
    squared_error: Float[Tensor, " sites"]  # sum ||x - x_hat||^2
    widths: tuple[int, ...]  # of the hook points
    cosine: Float[Tensor, ""]  # sum cos(x, x_hat), of several hook points the mean of theirs
    fired: Int[Tensor, " n_latents"]  # rows on which a latent is active

    def __add__(self, other: "ReconstructionSums") -> "ReconstructionSums":  # type: ignore[override]
        return ReconstructionSums(
            rows=self.rows + other.rows,
            x=self.x + other.x,
            squared_norm=self.squared_norm + other.squared_norm,
            squared_error=self.squared_error + other.squared_error,
            widths=self.widths,
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
    fvu_of_sites: tuple[float, ...]


def sums(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    *,
    active: Int[Tensor, " active"],
    n_latents: int,
    widths: Sequence[int] = (),
) -> ReconstructionSums:
    """The sums of one batch; `active` are the active latents of all rows, in any order.

    `widths`: of several hook points whose rows lie side by side.
    """
    x, x_hat, widths = x.double(), x_hat.double(), tuple(widths) or (x.shape[1],)
    split = (rows.split(widths, 1) for rows in (x, x_hat))
    return ReconstructionSums(
        rows=x.shape[0],
        x=x.sum(0),
        squared_norm=_of_sites(x, widths),
        squared_error=_of_sites(x - x_hat, widths),
        widths=widths,
        cosine=torch.stack([_cosine(*site) for site in zip(*split, strict=True)]).mean(),
        fired=torch.bincount(active, minlength=n_latents),
    )


def variance(total: ReconstructionSums) -> Float[Tensor, " sites"]:
    """sum ||x - mean(x)||^2 of each hook point."""
    return total.squared_norm - _of_sites(total.x[None], total.widths) / total.rows


def figures(total: ReconstructionSums) -> Reconstruction:
    """FVU = sum ||x - x_hat||^2 / sum ||x - mean(x)||^2: 0 is perfect, 1 is the mean. L0 = mean active latents a row.

    Of several hook points it is the mean of theirs, by width: as in training, the one of the largest norm does not
    decide alone.
    dead_fraction is the share of latents that are active on none of the rows.
    """
    fvu, widths = total.squared_error / variance(total), torch.tensor(total.widths).double()
    return Reconstruction(
        tokens=total.rows,
        fvu=float((fvu * widths).sum() / widths.sum()),
        l0=float(total.fired.sum() / total.rows),
        cosine=float(total.cosine / total.rows),
        dead_fraction=float((total.fired == 0).double().mean()),
        density=total.fired / total.rows,
        fvu_of_sites=tuple(fvu.tolist()),
    )


def _cosine(x: Float[Tensor, "rows width"], x_hat: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    return torch.cosine_similarity(x, x_hat, dim=-1).sum()


def _of_sites(rows: Float[Tensor, "rows width"], widths: Sequence[int]) -> Float[Tensor, " sites"]:
    """The sum of squares in the columns of each hook point."""
    return torch.stack([site.square().sum() for site in rows.split(tuple(widths), 1)])
