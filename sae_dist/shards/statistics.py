"""Statistics of activations that merge exactly in a fixed order: per unit and hook, then over any set of units.

Mean and M2 follow Chan, Golub, LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing variances").
"""

import base64
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from pydantic import Field
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards import records
from sae_dist.shards.records import CorruptData, Count

CHUNK_ROWS = 512


class Statistics(NamedTuple):
    """Sums and extremes over n rows; M2 = sum (x - mean)^2 per dimension."""

    n: int
    mean: Float64[np.ndarray, " width"]
    M2: Float64[np.ndarray, " width"]
    norm_mean: float  # E ||x||
    max_abs: float
    nonfinite: int  # rows with a NaN or an infinity; in no other figure

    @property
    def total_variance(self) -> float:
        """E ||x - mean||^2, the denominator of FVU per row."""
        return float(self.M2.sum() / max(self.n, 1))


def empty(width: int) -> Statistics:
    return Statistics(0, np.zeros(width), np.zeros(width), 0.0, 0.0, 0)


class MeasuredRows(NamedTuple):
    """The statistics of rows and which of them they are about."""

    statistics: Statistics
    finite: Bool[Tensor, " rows"]  # the squared norm is finite in fp32: no NaN, no infinity, no square that overflows


def measure(x: Float[Tensor, "rows width"]) -> MeasuredRows:
    """The statistics of `x`; rows that are not finite are counted and left out."""
    width = x.shape[1]
    rows_of, squares = torch.empty(2, CHUNK_ROWS, width)  # reused: fresh pages would cost more than the arithmetic
    total, finite = empty(width), torch.empty(len(x), dtype=torch.bool)
    for start in range(0, len(x), CHUNK_ROWS):
        part = x[start : start + CHUNK_ROWS]
        rows = rows_of[: len(part)].copy_(part)
        norms = torch.linalg.vector_norm(rows, dim=1)
        good = torch.isfinite(norms * norms)
        finite[start : start + len(part)] = good
        if not good.all():
            rows, norms = rows[good], norms[good]
        if len(rows):
            total = merge(total, _chunk(rows, norms, squares[: len(rows)]))
        total = total._replace(nonfinite=total.nonfinite + len(part) - len(rows))
    return MeasuredRows(total, finite)


def _chunk(
    rows: Float[Tensor, "rows width"], norms: Float[Tensor, " rows"], room: Float[Tensor, "rows width"]
) -> Statistics:
    """Statistics of a few rows, which are changed; sums are products with ones, the fastest way through memory."""
    smallest, largest = torch.aminmax(rows)
    ones = torch.ones(len(rows))
    mean = ones @ rows / len(rows)
    rows -= mean  # sum x^2 - n mean^2 would cancel: massive activations have mean^2 >> variance
    M2 = ones @ torch.square(rows, out=room)
    return Statistics(
        n=len(rows),
        mean=mean.double().numpy(),
        M2=M2.double().numpy(),
        norm_mean=float(norms.double().mean()),
        max_abs=max(float(largest), -float(smallest)),
        nonfinite=0,
    )


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of both together: M2 = M2_a + M2_b + delta^2 n_a n_b / n (Chan et al. 1979)."""
    if a.mean.shape != b.mean.shape:
        raise UserError(f"statistics of width {len(a.mean)} and {len(b.mean)} do not merge; they are of two hooks")
    n = a.n + b.n
    if n == 0:
        return a._replace(nonfinite=a.nonfinite + b.nonfinite)
    delta = b.mean - a.mean
    return Statistics(
        n=n,
        mean=a.mean + delta * (b.n / n),
        M2=a.M2 + b.M2 + delta**2 * (a.n * b.n / n),
        norm_mean=a.norm_mean + (b.norm_mean - a.norm_mean) * (b.n / n),
        max_abs=max(a.max_abs, b.max_abs),
        nonfinite=a.nonfinite + b.nonfinite,
    )


def merged(parts: Iterable[Statistics]) -> Statistics:
    """All parts in the order given; floating-point sums depend on the order, so give them by unit."""
    iterator = iter(parts)
    total = next(iterator)
    for part in iterator:
        total = merge(total, part)
    return total


def to_json(statistics: Statistics) -> dict[str, Any]:
    """Vectors as base64 of little-endian float32: 11 bytes a dimension instead of 40."""
    return statistics._asdict() | {"mean": _encode(statistics.mean), "M2": _encode(statistics.M2)}


class StatisticsRecord(NamedTuple):
    """What `to_json` gives, as it is read back."""

    n: Count
    mean: str
    M2: str
    norm_mean: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    max_abs: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    nonfinite: Count


def from_json(record: dict[str, Any], *, width: int, what: str) -> Statistics:
    """The statistics of rows of that width; CorruptData that begins with `what` where they make no sense."""
    stored = records.checked(StatisticsRecord, record, what)
    mean, M2 = _decode(stored.mean), _decode(stored.M2)
    if not all(len(vector) == width and np.isfinite(vector).all() for vector in (mean, M2)) or (M2 < 0).any():
        raise CorruptData(f"{what} makes no sense: mean and M2 are not {width} finite numbers, M2 of them positive")
    return Statistics(stored.n, mean, M2, stored.norm_mean, stored.max_abs, stored.nonfinite)


def _encode(vector: Float64[np.ndarray, " width"]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _decode(text: str) -> Float64[np.ndarray, " width"]:
    """The vector; empty where the text is none."""
    try:
        return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)
    except ValueError:
        return np.empty(0)
