"""What a sweep came to, as plain tables: for CSV and JSON, for the page, and for a tracker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_dist.sweep.law import OPENAI, Fit, Refusal
from sae_dist.sweep.next_point import NextPoint, next_point
from sae_dist.sweep.point import Point
from sae_dist.sweep.rows import FIGURES, Row, frontier, label, row, shown, varying
from sae_dist.sweep.scaling import Law, Prediction, laws, predictions, target

Table = list[dict[str, Any]]
MEASURED = ("n_latents", "k", *FIGURES, "tokens", "flops", "seconds", "cost")


@dataclass(frozen=True)
class Analysis:
    """Everything that the report says, before it is drawn."""

    rows: tuple[Row, ...]
    keys: tuple[str, ...]  # that vary between points
    laws: tuple[Law, ...]
    n_latents: int | None  # the size that laws are continued to
    next: NextPoint

    def predictions(self, fitted: Law) -> list[Prediction]:
        return predictions(fitted, self.n_latents) if self.n_latents else []

    def named(self, each: Row) -> str:
        """A point in words: the values that tell it from others, or its id."""
        return label(each, self.keys) or each.point.id


def analyse(points: Sequence[Point], extrapolate_to: int | None = None) -> Analysis:
    """Fits the laws and chooses the next point. Rows are in the order of the values that vary, numbers by size."""
    keys = varying(points)
    rows = tuple(
        row(point) for point in sorted(points, key=lambda point: [_rank(point.overrides.get(k)) for k in keys])
    )
    found = tuple(laws(rows))
    return Analysis(
        rows=rows,
        keys=tuple(keys),
        laws=found,
        n_latents=target(rows, extrapolate_to),
        next=next_point(rows, found, n_latents=extrapolate_to),
    )


def _rank(value: object) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, value if number else 0, shown(value)


def report_tables(points: Sequence[Point], extrapolate_to: int | None = None) -> dict[str, Table]:
    """The tables of a sweep by name; all values are text, finite numbers or None."""
    return tables(analyse(points, extrapolate_to))


def tables(analysis: Analysis) -> dict[str, Table]:
    """The tables of an analysis by name; a table without rows is empty."""
    return {
        "points": [_point(each) for each in analysis.rows],
        "frontier": [
            {"figure": figure, "id": each.point.id, "l0": each.l0, "value": each.get(figure),
             "n_latents": each.n_latents}
            for figure in ("fvu", "loss_recovered")
            for each in frontier(analysis.rows, figure)
        ],
        "laws": [line for each in analysis.laws for line in _law(each)],
        "residuals": [line for each in analysis.laws for line in _residuals(each)],
        "predictions": [
            {"law": each.name, "group": each.group, "n_latents": found.n_latents, "k": found.k, "fvu": found.fvu.value,
             "low": found.fvu.low, "high": found.fvu.high, "times_the_largest": found.beyond}
            for each in analysis.laws
            for found in analysis.predictions(each)
        ],
        "failures": [
            {"id": each.point.id, "point": analysis.named(each), "tries": each.point.tries,
             "failure": each.point.failure}
            for each in analysis.rows
            if each.point.state == "failed"
        ],
        "next": [{"keys": analysis.next.keys, "why": analysis.next.why}],
    }  # fmt: skip


def _point(each: Row) -> dict[str, Any]:
    point = each.point
    asked = {key: _plain(value) for key, value in point.overrides.items()}
    figures = {name: each.get(name) for name in MEASURED}
    return {"id": point.id, **asked, "state": point.state, "tries": point.tries, **figures, "failure": point.failure}


def _plain(value: object) -> Any:
    """What every table can hold: numbers and text; anything else as text."""
    return value if isinstance(value, str | bool | int) or value is None else _number_or_text(value)


def _number_or_text(value: object) -> float | str:
    return value if isinstance(value, float) and np.isfinite(value) else str(value)


def _law(each: Law) -> Table:
    head = {"law": each.name, "group": each.group, "points": len(each.rows)}
    if isinstance(each.found, Refusal):
        nothing = dict.fromkeys(("parameter", "value", "low", "high", "openai"))
        return [{**head, **nothing, "refused": each.found.text}]
    published = OPENAI if each.name == "L(n, k)" else {}
    return [
        {**head, "parameter": name, "value": found.value, "low": found.low, "high": found.high,
         "openai": published.get(name), "refused": None}
        for name, found in _estimates(each.found).items()
    ]  # fmt: skip


def _estimates(found: Fit) -> dict[str, Any]:
    return {f"exponent of {name}": each for name, each in found.exponents.items()} | {
        "irreducible part": found.floor, **found.parameters
    }  # fmt: skip


def _residuals(each: Law) -> Table:
    if isinstance(each.found, Refusal):
        return []
    return [
        {"law": each.name, "group": each.group, "id": one.point.id, "n_latents": one.n_latents, "k": one.k,
         "flops": one.flops, "fvu": one.fvu, "residual": float(np.expm1(left))}
        for one, left in zip(each.rows, each.found.residuals, strict=True)
    ]  # fmt: skip
