"""Several values of a key on a command line, in Hydra's own syntax for sweeps, and the points that they make.

sae.k=16,32   seed=range(3)   'sae.n_latents=choice(4096,16384)'   sae=glob(*)   'sae.k=sort(32,16)'
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException

from sae_dist.cli.compose import options
from sae_dist.config import UserError
from sae_dist.sweep.search import Interval, Space

MOST = 10_000  # points: more is a slip


class Axis(NamedTuple):
    """A key and the values that it takes, as Hydra writes them."""

    key: str
    values: tuple[str, ...]
    interval: Interval | None = None  # where it is not a list, for search=optuna

    def within(self, given: Any) -> str | float | None:
        """A point's value as the search has it: as it was written, or a number of the interval; None if it is none."""
        if self.interval is None:
            return next((text for text in self.values if value(f"{self.key}={text}") == given), None)
        inside = isinstance(given, int | float) and self.interval.low <= given <= self.interval.high
        return given if inside else None


class Grid(NamedTuple):
    """A command line with several values of some keys."""

    fixed: list[str]  # overrides that all points share
    axes: list[Axis]

    def points(self) -> list[list[str]]:
        """The overrides of every point; the last key changes fastest."""
        return [
            [f"{axis.key}={value}" for axis, value in zip(self.axes, values, strict=True)]
            for values in itertools.product(*(axis.values for axis in self.axes))
        ]

    def space(self) -> Space:
        """What a search may choose from."""
        return {axis.key: axis.interval or axis.values for axis in self.axes}


def read(overrides: Sequence[str], config: type, *, searched: bool = False) -> Grid:
    """The grid that the overrides of a command make; UserError for one that has no end, unless it is `searched`."""
    fixed, axes = [], list[Axis]()
    for override in overrides:
        parsed = _parsed(override)
        if parsed is None:
            fixed.append(override)
        elif searched and isinstance(given := parsed.value(), IntervalSweep):
            axes.append(Axis(str(parsed.key_or_group), (), _interval(given)))
        else:
            axes.append(Axis(str(parsed.key_or_group), _values(parsed, override, config)))
    if (points := math.prod(len(axis.values) for axis in axes)) > MOST:
        sizes = " x ".join(f"{len(axis.values)} of {axis.key}" for axis in axes)
        raise UserError(f"{sizes} are {points:,} points; a sweep has {MOST:,} at most")
    return Grid(fixed, axes)


def value(override: str) -> Any:
    """What Hydra makes of the value of an override."""
    return OverridesParser.create().parse_override(override).value()


def _parsed(override: str) -> Override | None:
    """An override with several values; None for any other, which compose.py sees to."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return None
    return parsed if parsed.is_sweep_override() else None


def _interval(given: IntervalSweep) -> Interval:
    low, high = given.start, given.end
    assert low is not None and high is not None
    return Interval(low, high, "log" in given.tags, isinstance(low, int) and isinstance(high, int))


def _values(parsed: Override, override: str, config: type) -> tuple[str, ...]:
    given = parsed.value()
    if isinstance(given, Glob):
        found = tuple(given.filter(options(str(parsed.key_or_group), config)))
        if not found:
            raise UserError(f"{override} matches nothing; {parsed.key_or_group} has none of that name")
        return found
    if not parsed.is_discrete_sweep():
        raise UserError(f"{override} has no end; give a list, or range(start,stop,step), or search=optuna")
    return tuple(dict.fromkeys(parsed.sweep_string_iterator()))
