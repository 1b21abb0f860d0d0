"""Scaling: a number for each hook point, applied while training and folded in of the finished dictionary."""

import functools
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Scale(NamedTuple):
    """What rows are multiplied by before anything else: a factor for each of the hook points side by side."""

    factors: tuple[Factor, ...]
    widths: tuple[Annotated[int, Field(ge=1)], ...]

    def of(self, rows: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """The rows scaled."""
        return rows * self.by_dim(rows.device)

    def by_dim(self, device: torch.device | str = "cpu") -> float | Float[Tensor, " width"]:
        """The factor of every dimension; one number where there is one hook point."""
        return self.factors[0] if len(self.factors) == 1 else _by_dim(self, torch.device(device))


class Scales(NamedTuple):
    """Those of x and of the target, equal where what is rebuilt is x, and what activations are multiplied by."""

    x: Scale
    target: Scale
    z: Factor


def input_scale(mean_square_norm: float, d_model: int) -> float:
    """The s for which E||s x||^2 = d_model (Templeton et al. 2024), so that one learning rate fits all layers."""
    return (d_model / max(mean_square_norm, 1e-30)) ** 0.5


def scale_of(x: Float[Tensor, "rows width"], widths: tuple[int, ...]) -> Scale:
    """The scale of raw rows of hook points of these widths.

    Of several, each gets the same variance a dimension: the loss is a sum over hook points, in which the one with the
    largest norm would drown the others.
    """
    if len(widths) > 1:
        x = x - x.mean(0)
    squares = [float(site.double().square().sum(-1).mean()) for site in x.split(widths, 1)]
    return Scale(tuple(input_scale(square, width) for square, width in zip(squares, widths, strict=True)), widths)


def latent_scale(target: Scale) -> float:
    """What scaled activations are divided by: the target's factor, of several hook points that of all together.

    Where it is one hook point, rows of W_dec so keep their norm.
    """
    if len(target.factors) == 1:
        return target.factors[0]
    mean_square = sum(width / factor**2 for factor, width in zip(*target, strict=True))
    return input_scale(mean_square, sum(target.widths))


@functools.lru_cache(16)
def _by_dim(scale: Scale, device: torch.device) -> Tensor:
    return torch.tensor(scale.factors, device=device).repeat_interleave(torch.tensor(scale.widths, device=device))
