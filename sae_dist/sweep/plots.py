"""The plots of a sweep.

Fields of their data have names of our own, since a key such as `sae.k` would be read as a path.
"""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from sae_dist.sweep.drawing import QUIET, Chart, Plot, axis, colour, named, shape
from sae_dist.sweep.law import Fit
from sae_dist.sweep.rows import N_LATENTS, SEED, K, Row, frontier, label, other_keys, over_seeds, shown, varying
from sae_dist.sweep.scaling import Law, sparsity
from sae_dist.sweep.tables import Analysis

TITLES = {
    "n_latents": "latents", "k": "k", "flops": "training FLOPs", "tokens": "tokens", "seconds": "seconds", "fvu": "FVU",
    "l0": "L0", "loss_recovered": "loss recovered", "dead_fraction": "dead share",
}  # fmt: skip
EVERY, OF_WORK = ("fvu", "l0", "loss_recovered", "dead_fraction"), ("fvu", "loss_recovered")
AXES = {"n_latents": EVERY, "k": EVERY, "flops": EVERY, "tokens": OF_WORK, "seconds": OF_WORK}  # figures against each
WORK = ("flops", "tokens", "seconds")
LOG = (*AXES, "fvu")  # axes that are logarithmic whatever they span
STEPS = 40  # of a curve


def plots(analysis: Analysis) -> list[Plot]:
    """All pictures of a sweep that there are figures for, by section."""
    return [
        *(plot for place in _axes(analysis.rows) for plot in _figures(analysis.rows, *place)),
        *_frontiers(analysis.rows),
        *(plot for number, each in enumerate(analysis.laws) for plot in _law(number, each, analysis.n_latents)),
    ]


def _axes(rows: Sequence[Row]) -> list[tuple[str, str, tuple[str, ...]]]:
    """A name for files, the axis, and the figures against it: of everything that differs between points."""
    differ = [name for name in AXES if len({row.get(name) for row in rows} - {None}) > 1]
    swept = [(f"key{number}", key, EVERY) for number, key in enumerate(other_keys(rows))]
    return [(name, name, AXES[name]) for name in differ] + swept or [("n_latents", "n_latents", EVERY)]


def _figures(rows: Sequence[Row], slug: str, along: str, figures: Sequence[str]) -> list[Plot]:
    """Figures against an axis: a line for each value of all other keys, seeds as their mean and range."""
    found = []
    for figure in figures:
        if marks := _marks(rows, along, figure):
            by = f"by {TITLES.get(along, along)}"
            chart = _lines(marks, along, figure)
            found.append(Plot(f"{figure}_by_{slug}", f"B{by[1:]}", f"{_capital(TITLES[figure])} {by}", chart))
    return found


def _by(rows: Sequence[Row], along: str) -> str:
    """What colours tell apart: k, or the size where k is the axis or does not differ."""
    return "n_latents" if along == "k" or len({row.k for row in rows}) < 2 else "k"


def _marks(rows: Sequence[Row], along: str, figure: str) -> list[dict[str, Any]]:
    """A mark for each point that has both figures, seeds together."""
    own = {"n_latents": N_LATENTS, "k": K}.get(along, along)
    by = _by(rows, along)
    apart = [key for key in varying(row.point for row in rows) if key not in (SEED, own)]
    if along in WORK:  # grows with size, so lines go along sizes
        apart = [key for key in apart if key != N_LATENTS]
    groups = other_keys(rows, but=(along,))
    found = []
    for cell in over_seeds(rows):
        pairs = [(row.get(along), row.get(figure)) for row in cell]
        pairs = [(place, value) for place, value in pairs if place is not None and value is not None]
        if not pairs:
            continue
        places, values = zip(*pairs, strict=True)
        found.append({
            "x": _mean(places), "y": math.fsum(values) / len(values), "low": min(values), "high": max(values),
            "seeds": len(values), "size": cell[0].get(by), "colour": named(cell[0].get(by)),
            "by": TITLES[by], "group": label(cell[0], groups), "line": label(cell[0], apart),
        })  # fmt: skip
    return found


def _mean(places: Sequence[Any]) -> float | str:
    """The place of some seeds on an axis: their mean, or their name where it is no number."""
    numbers = [place for place in places if isinstance(place, int | float) and not isinstance(place, bool)]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(places) else shown(places[0])


def _lines(marks: list[dict[str, Any]], along: str, figure: str) -> Chart:
    if any(isinstance(mark["x"], str) for mark in marks):
        marks = [{**mark, "x": shown(mark["x"])} for mark in marks]
    base = alt.Chart(alt.Data(values=marks))
    places, values = [mark["x"] for mark in marks], [mark[end] for mark in marks for end in ("low", "high")]
    labels = places if along in ("n_latents", "k", "tokens") else ()
    x = axis(alt.X, "x", TITLES.get(along, along), places, log=along in LOG or _wide(places), labels=labels)
    log = figure in LOG or (figure == "l0" and _wide(values))
    y, low = (axis(alt.Y, field, TITLES[figure], values, log=log) for field in ("y", "low"))
    tint = colour([mark["size"] for mark in marks], marks[0]["by"])
    layers = []
    if along != "seconds":  # which do not grow with anything when machines are shared
        layers.append(base.mark_line(strokeWidth=1.5, opacity=0.6).encode(x=x, y=y, color=tint, detail="line:N"))
    if any(mark["seeds"] > 1 for mark in marks):
        layers.append(base.mark_rule(strokeWidth=1.5).encode(x=x, y=low, y2="high:Q", color=tint))
    layers.append(base.mark_point(size=55, opacity=1).encode(x=x, y=y, color=tint, **shape(m["group"] for m in marks)))
    return alt.layer(*layers)


def _wide(values: Sequence[Any]) -> bool:
    """Whether numbers span so much that their logarithms are to be drawn."""
    numbers = [value for value in values if isinstance(value, int | float)]
    return bool(numbers) and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _frontiers(rows: Sequence[Row]) -> list[Plot]:
    found = []
    for figure in OF_WORK:
        marks = [
            {"x": row.l0, "y": row.get(figure), "size": row.n_latents, "colour": named(row.n_latents)}
            for row in rows
            if row.l0 is not None and row.get(figure) is not None
        ]
        if not marks:
            continue
        best = [{"x": row.l0, "y": row.get(figure)} for row in frontier(rows, figure)]
        x = axis(alt.X, "x", TITLES["l0"], [mark["x"] for mark in marks], log=_wide([mark["x"] for mark in marks]))
        y = axis(alt.Y, "y", TITLES[figure], [mark["y"] for mark in marks], log=figure in LOG)
        line = alt.Chart(alt.Data(values=best)).mark_line(interpolate="step-after", strokeWidth=1.5, color=QUIET[0])
        dots = alt.Chart(alt.Data(values=marks)).mark_point(size=55, opacity=1)
        tint = colour([mark["size"] for mark in marks], TITLES["n_latents"])
        chart = alt.layer(line.encode(x=x, y=y), dots.encode(x=x, y=y, color=tint))
        found.append(Plot(f"frontier_{figure}", "Frontier", f"{_capital(TITLES[figure])} against L0", chart))
    return found


def _law(number: int, each: Law, n_latents: int | None) -> list[Plot]:
    """The curve with its intervals among the points, and what it leaves of each point."""
    if not isinstance(each.found, Fit):
        return []
    title = f"{each.name} of {each.group}" if each.group else each.name
    section = f"Law {number}"
    return [
        Plot(f"law{number}", section, title, _curves(each, each.found, n_latents)),
        Plot(f"law{number}_residuals", section, f"Residuals of {title}", _residuals(each, each.found)),
    ]


def _curves(each: Law, found: Fit, n_latents: int | None) -> Chart:
    dots = [
        {"x": row.get(each.x), "y": row.fvu, "size": sparsity(row), "colour": named(sparsity(row))} for row in each.rows
    ]
    ks, sizes = sorted({dot["size"] for dot in dots}), sorted({dot["x"] for dot in dots})
    end = max(sizes[-1], n_latents or 0) if each.x == "n_latents" else sizes[-1]
    grid = np.unique(np.concatenate([np.geomspace(sizes[0], end, STEPS), [sizes[-1]]]))
    curve = []
    for k in ks:
        for size in grid.tolist():
            at = found.at(size, k)
            curve.append({"x": size, "y": at.value, "low": at.low, "high": at.high, "colour": named(k)})
    inside = [mark for mark in curve if mark["x"] <= sizes[-1]]
    beyond = [mark for mark in curve if mark["x"] >= sizes[-1]]
    labels = [size for size in sizes if each.x == "n_latents"] + ([end] if end > sizes[-1] else [])
    x = axis(alt.X, "x", TITLES[each.x], [sizes[0], end], log=True, labels=labels)
    values = [mark[end] for mark in curve for end in ("low", "high")] + [dot["y"] for dot in dots]
    y, low = (axis(alt.Y, field, "FVU", values, log=True) for field in ("y", "low"))
    tint = colour(ks, "k")
    charts = [alt.Chart(alt.Data(values=values)) for values in (curve, inside, beyond, dots)]
    return alt.layer(
        charts[0].mark_area(opacity=0.15).encode(x=x, y=low, y2="high:Q", color=tint),
        charts[1].mark_line(strokeWidth=1.5).encode(x=x, y=y, color=tint),
        charts[2].mark_line(strokeWidth=1.5, strokeDash=[4, 3]).encode(x=x, y=y, color=tint),
        charts[3].mark_point(size=55, opacity=1).encode(x=x, y=y, color=tint),
    )


def _residuals(each: Law, found: Fit) -> Chart:
    marks = [
        {"x": row.get(each.x), "y": 100 * math.expm1(left), "size": sparsity(row), "colour": named(sparsity(row))}
        for row, left in zip(each.rows, found.residuals.tolist(), strict=True)
    ]
    places = [mark["x"] for mark in marks]
    x = axis(alt.X, "x", TITLES[each.x], places, log=True, labels=places if each.x == "n_latents" else ())
    y = axis(alt.Y, "y", "measured over fitted, %", [mark["y"] for mark in marks], log=False)
    zero = alt.Chart(alt.Data(values=[{"y": 0.0}])).mark_rule(color=QUIET[0]).encode(y=y)
    dots = alt.Chart(alt.Data(values=marks)).mark_point(size=55, opacity=1)
    return alt.layer(zero, dots.encode(x=x, y=y, color=colour([mark["size"] for mark in marks], "k")))
