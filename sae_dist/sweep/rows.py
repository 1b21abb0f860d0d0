"""The points of a sweep as rows of figures: what the report, its tables and the scaling laws read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_dist.sweep.point import Point

N_LATENTS, K, SEED = "sae.n_latents", "sae.k", "seed"
LENGTHS = ("train.tokens", "train.steps")  # how long a point trains
FIGURES = ("fvu", "l0", "loss_recovered", "dead_fraction")


@dataclass(frozen=True)
class Row:
    """One point. A figure that was not measured, or that is no finite number, is None."""

    point: Point
    n_latents: float | None
    k: float | None
    fvu: float | None
    l0: float | None
    loss_recovered: float | None
    dead_fraction: float | None
    tokens: float | None
    flops: float | None
    seconds: float | None
    cost: float | None

    def get(self, axis: str) -> Any:
        """A figure by its name, or the value of a swept key."""
        return getattr(self, axis) if axis in _AXES else self.point.overrides.get(axis)


_AXES = ("n_latents", "k", *FIGURES, "tokens", "flops", "seconds", "cost")


def row(point: Point) -> Row:
    """What is known of a point; sizes are those of its dictionary, or those that it asks for while it has none."""
    summary = point.summary or {}
    judged = summary.get("eval")
    judged = judged if isinstance(judged, Mapping) else {}
    n_latents = _number(summary.get("n_latents", point.overrides.get(N_LATENTS)))
    k = _number(summary.get("k", point.overrides.get(K)))
    tokens, judged_l0 = _number(summary.get("tokens_trained")), _number(judged.get("l0"))
    return Row(
        point=point,
        n_latents=n_latents,
        k=k,
        **{name: _number(judged.get(name)) for name in FIGURES},
        tokens=tokens,
        flops=training_flops(n_latents, judged_l0 if k is None else k, _number(summary.get("d_model")), tokens),
        seconds=_number(point.seconds),
        cost=_number(point.cost),
    )


def training_flops(
    n_latents: float | None, k: float | None, d_model: float | None, tokens: float | None
) -> float | None:
    """FLOPs of a training: tokens x (2 d_model n_latents + 8 d_model k); None where one of them is unknown.

    One dense product chooses the latents; decode, d_z and the two gradients touch the k active ones. The optimizer,
    AuxK and the language model are not counted.
    """
    if n_latents is None or k is None or d_model is None or tokens is None:
        return None
    return tokens * (2 * d_model * n_latents + 8 * d_model * k)


def varying(points: Iterable[Point]) -> list[str]:
    """The keys whose values differ between points, in the order of their first appearance."""
    points = list(points)
    keys = dict.fromkeys(key for point in points for key in point.overrides)
    return [key for key in keys if len({shown(point.overrides.get(key)) for point in points}) > 1]


def label(row: Row, keys: Sequence[str]) -> str:
    """Values of some keys in one line, as a command line has them; empty without keys."""
    return ", ".join(f"{key}={shown(row.point.overrides.get(key))}" for key in keys)


def shown(value: object) -> str:
    """A value of a swept key as text."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def other_keys(rows: Sequence[Row], *, but: Iterable[str] = ()) -> list[str]:
    """Varying keys that are neither sizes nor seeds: plots and laws tell their values apart."""
    known = {N_LATENTS, K, SEED, *but}
    return [key for key in varying(row.point for row in rows) if key not in known]


def over_seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but their seed, together."""
    cells: dict[str, list[Row]] = {}
    for each in rows:
        key = repr(sorted((k, shown(v)) for k, v in each.point.overrides.items() if k != SEED))
        cells.setdefault(key, []).append(each)
    return list(cells.values())


def seed_spread(rows: Sequence[Row]) -> float | None:
    """Standard deviation of ln FVU between seeds, pooled over points; None where no point has two."""
    squares, freedom = 0.0, 0
    for cell in over_seeds(rows):
        logs = [math.log(each.fvu) for each in cell if each.fvu is not None and each.fvu > 0]
        if len(logs) > 1:
            mean = math.fsum(logs) / len(logs)
            squares += math.fsum((one - mean) ** 2 for one in logs)
            freedom += len(logs) - 1
    return math.sqrt(squares / freedom) if freedom else None


def frontier(rows: Sequence[Row], figure: str) -> list[Row]:
    """The rows that no other beats in L0 (fewer is better) and in `figure` at once, by L0.

    FVU is better where it is less, every other figure where it is more.
    """
    sign = 1 if figure == "fvu" else -1
    measured = [(each.l0, sign * each.get(figure), each) for each in rows if None not in (each.l0, each.get(figure))]
    best, found = math.inf, []
    for _, value, each in sorted(measured, key=lambda one: one[:2]):
        if value < best:
            best = value
            found.append(each)
    return found


def _number(value: object) -> float | None:
    """A finite number as it is, anything else as not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
