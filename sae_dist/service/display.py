"""The progress of a run: a live table on a terminal, a plain line every 15 s elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sae_dist.monitor.metrics import newest_metrics
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import split_name

logger = logging.getLogger(__name__)

PLAIN_EVERY_S = 15.0


def duration(seconds: float) -> str:
    """75 -> '1:15', 3723 -> '1:02:03'."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def quantity(value: object) -> str:
    """A figure as text: 12,345 or 0.312 or 4.1e-05; "-" for None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 0 < abs(value) < 0.001 else f"{value:.3f}"


def progress(out: Path, config: TrainConfig) -> dict[str, Any]:
    """How far a training is, from the last line of its metrics.jsonl."""
    newest = newest_metrics(out / "metrics.jsonl")
    facts: dict[str, Any] = {"step": newest.get("step", 0), "of": config.n_steps}
    shown = ("fvu", "l0", "dead_fraction", "tokens_per_second", "starved_fraction")
    facts |= {key: newest[key] for key in shown if newest.get(key) is not None}
    if newest.get("tokens_per_second"):
        facts["eta"] = duration((facts["of"] - facts["step"]) * config.batch / newest["tokens_per_second"])
    for key, value in newest.items():  # of other dictionaries in the same pass
        prefix, figure = split_name(key)
        if prefix and figure in shown and value is not None:
            facts.setdefault(prefix.rstrip("/"), {})[figure] = value
    return facts


class Display:
    """Shows the newest facts of every phase; `update` may be called at any rate."""

    def __init__(self, title: str) -> None:
        self._title, self._started, self._printed = title, time.monotonic(), 0.0
        self._phases: dict[str, Mapping[str, Any]] = {}
        self._console = Console(file=sys.stderr)
        self._live = (
            Live(console=self._console, refresh_per_second=4, transient=False) if self._console.is_terminal else None
        )

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def update(self, phase: str, facts: Mapping[str, Any], *, now: bool = False) -> None:
        """Replaces the facts of a phase, shown in their order; `now` prints the plain line at once."""
        self._phases[phase] = facts
        if self._live is not None:
            self._live.update(self._table())
        elif now or time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            for name, facts in self._phases.items():
                for line in lines(name, facts):
                    logger.info("%s", line)
            self._phases = {name: {} for name in self._phases}

    def _table(self) -> Table:
        table = Table(
            title=f"{self._title}   {duration(time.monotonic() - self._started)}",
            title_justify="left",
            show_header=False,
        )
        table.add_column(style="bold")
        table.add_column()
        for name, facts in self._phases.items():
            inner = {key: value for key, value in facts.items() if isinstance(value, Mapping)}
            table.add_row(name, _markup(facts))
            for key, values in inner.items():
                table.add_row(f"  {key}", _markup(values))
        return table


def lines(name: str, facts: Mapping[str, Any]) -> list[str]:
    """The facts of a phase as text: one line, and one more for every nested part."""
    flat = "  ".join(f"{key} {quantity(value)}" for key, value in facts.items() if not isinstance(value, Mapping))
    inner = [part for key, value in facts.items() if isinstance(value, Mapping) for part in lines(f"  {key}", value)]
    return ([f"{name:<9} {flat}"] if flat else []) + inner


def _markup(facts: Mapping[str, Any]) -> str:
    flat = {key: value for key, value in facts.items() if not isinstance(value, Mapping)}
    return "   ".join(f"[dim]{key}[/dim] {escape(quantity(value))}" for key, value in flat.items())
