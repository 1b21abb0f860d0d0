"""Scaling: a number for x and one for the target, applied while training and folded in of the finished dictionary."""

from typing import Annotated, NamedTuple

from pydantic import Field

Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Scales(NamedTuple):
    """What rows are multiplied by before anything else; equal where what is rebuilt is x."""

    x: Factor
    target: Factor


def input_scale(mean_square_norm: float, d_model: int) -> float:
    """The s for which E||s x||^2 = d_model (Templeton et al. 2024), so that one learning rate fits all layers."""
    return (d_model / max(mean_square_norm, 1e-30)) ** 0.5
