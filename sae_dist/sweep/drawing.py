"""What all plots share: colours, axes, and a specification as SVG and PNG without a browser.

An SVG follows the reader's colour scheme: each of its colours stands for one on a dark ground too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

WIDTH, HEIGHT = 280, 200  # pixels of a plot without its axes
# Pairs of colours: on a light ground, on a dark one
INK, QUIET, LINE = ("#1d1b18", "#e8e5de"), ("#6a655c", "#a09b91"), ("#e5e1d8", "#303138")
ACCENT = ("#1f5f91", "#84bdea")
SERIES = (  # from the smallest value to the largest, mixed between
    ("#d49a00", "#f4d58a"), ("#1c8a76", "#5cc2ae"), ("#2a6db0", "#84b4ea"), ("#7a2c91", "#d3a4ee"),
)  # fmt: skip
MOST_LABELS = 6  # of an axis
NUMBER = (  # an expression that writes the number at a tick
    "abs(datum.value) >= 1e7 ? format(datum.value, '.2~e') : abs(datum.value) >= 1000 ? format(datum.value, ',.0f') : "
    "format(datum.value, '.3~g')"
)
SHADES = 13  # of the palette; where more values are told apart, neighbours share one
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
CONFIG = {
    "font": "system-ui, Liberation Sans, DejaVu Sans, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": QUIET[0], "titleColor": INK[0], "gridColor": LINE[0], "domainColor": QUIET[0],
        "tickColor": QUIET[0], "titleFontWeight": 500, "labelFontSize": 11, "titleFontSize": 12,
        "labelOverlap": "greedy",
    },
    "legend": {
        "orient": "top", "labelColor": INK[0], "titleColor": QUIET[0], "titleFontWeight": 400, "labelFontSize": 11,
        "titleFontSize": 11, "titleOrient": "left", "columns": 4, "labelLimit": 300, "symbolSize": 60,
        "symbolOpacity": 1, "titlePadding": 8,
    },
    "point": {"color": ACCENT[0], "filled": True},
    "line": {"color": ACCENT[0]},
}  # fmt: skip


Chart = alt.LayerChart | alt.FacetChart  # what alt.layer returns


@dataclass(frozen=True)
class Plot:
    """One picture: its file name without a suffix, its section of the page, what it shows, and its specification."""

    name: str
    section: str
    title: str
    chart: Chart

    @property
    def spec(self) -> dict[str, Any]:
        """Vega-Lite, with the data in it."""
        return {**self.chart.properties(width=WIDTH, height=HEIGHT).to_dict(), "config": CONFIG}


def svg(plot: Plot) -> str:
    """The picture on a transparent ground, in the colours that the reader's scheme asks for."""
    text = vl_convert.vegalite_to_svg({**plot.spec, "background": "transparent"})
    dark = dict([INK, QUIET, LINE, ACCENT, *PALETTE])
    used = {one: other for one, other in dark.items() if f'"{one}"' in text}
    rules = "".join(f'[fill="{one}"]{{fill:{other}}}[stroke="{one}"]{{stroke:{other}}}' for one, other in used.items())
    head, end, rest = text.partition(">")
    return f"{head}{end}<style>@media (prefers-color-scheme:dark){{{rules}}}</style>{rest}"


def png(plot: Plot) -> bytes:
    """The picture on white, twice as large."""
    return vl_convert.vegalite_to_png({**plot.spec, "background": "#ffffff"}, scale=2)


def axis(
    channel: type[alt.X] | type[alt.Y], field: str, title: str, values: Sequence[object], *, log: bool,
    labels: Iterable[float] = (),
) -> Any:  # fmt: skip
    """A channel of numbers, or of names where a value is none. A few `labels` are marked, else round values."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return channel(f"{field}:N", title=title, axis=alt.Axis(labelAngle=0, grid=False, labelLimit=160))
    low, high = min(numbers), max(numbers)
    log = log and low > 0
    if low == high:
        low, high = (low / 2, high * 2) if log else sorted((0.0, 2 * low or 1.0))  # a share is never below zero
    own = sorted(set(labels))
    shown = own if 0 < len(own) <= MOST_LABELS else ticks(low, high, log=log)
    scale = alt.Scale(type="log" if log else "linear", domain=[low, high], zero=False, nice=False, padding=12)
    drawn = alt.Axis(grid=channel is alt.Y, values=shown, labelExpr=NUMBER, labelSeparation=6)  # none touches the next
    return channel(f"{field}:Q", title=title, scale=scale, axis=drawn)


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """A few round values from `low` to `high`: 1, 2, 5 of every power of ten or powers alone, else in equal steps."""
    if log and high >= 10 * low:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        each = [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= m * 10.0**power <= high]
        return each if len(each) <= MOST_LABELS else [value for value in each if math.log10(value).is_integer()]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * max(m for m in (1, 2, 5) if m * power <= rough)
    return [round(at * step, 12) for at in range(math.ceil(low / step), math.floor(high / step) + 1)]


def colour(values: Iterable[float | None], title: str) -> Any:
    """A colour for each size or k, from the smallest to the largest; one for all where there is one value."""
    found = sorted({value for value in values if value is not None})
    if len(found) < 2:
        return alt.value(ACCENT[0])
    return alt.Color(
        "colour:N", title=title, sort=[named(value) for value in found],
        scale=alt.Scale(domain=[named(value) for value in found], range=_shades(len(found))),
    )  # fmt: skip


def shape(groups: Iterable[str]) -> dict[str, Any]:
    """A shape for each group of points, where there are several and not too many."""
    found = list(dict.fromkeys(groups))
    if not 1 < len(found) <= len(SHAPES):
        return {}
    legend = alt.Legend(orient="bottom", direction="vertical", columns=1, symbolLimit=12)
    return {"shape": alt.Shape("group:N", title=None, sort=found, scale=alt.Scale(range=list(SHAPES)), legend=legend)}


def named(value: float | None) -> str:
    """A size or k as a legend has it."""
    return "" if value is None else f"{value:,.10g}"


def _shades(of: int) -> list[str]:
    """So many colours of the palette, far from one another."""
    return [PALETTE[round(at / (of - 1) * (SHADES - 1))][0] for at in range(of)]


def _mixed(number: int, scheme: int) -> str:
    """Colour `number` of the palette, between those of the series."""
    place = number / (SHADES - 1) * (len(SERIES) - 1)
    at = min(int(place), len(SERIES) - 2)
    one, other = (SERIES[at + step][scheme] for step in (0, 1))
    parts = ((int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * (place - at)):02x}" for a, b in parts)


PALETTE = [(_mixed(number, 0), _mixed(number, 1)) for number in range(SHADES)]
