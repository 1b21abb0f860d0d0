"""Rates of replicas and shares of their time, from their reports. Pure: times are arguments."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from sae_dist.harvest.harvester import UnitReport

RECENT = 8  # units that the current rate is taken over
SLOW_ANSWER_S, SLOW_RATIO = (
    1.0,
    4.0,
)  # a process that answers after so long, and so many times the median of the others, is named
SLOW_RATE = 0.5  # of the median of the others: a replica below it is named
PARTS: dict[str, Callable[[UnitReport], float]] = {
    "tokenise": lambda report: report.gather_s,
    "forward": lambda report: report.forward_s,
    "copy": lambda report: report.copy_s,
    "write": lambda report: report.write_s,
    "blocked": lambda report: report.blocked_s,
}


class Snapshot(NamedTuple):
    """A time, and the positions and operations that were done by then."""

    time: float
    positions: int
    flop: float


class Throughput:
    """One replica since it was ready at `now`; `flop_per_s` is its speed on plain matrix products."""

    def __init__(self, now: float, flop_per_s: float) -> None:
        self.units = self.rows = self.outliers = self.nonfinite = self.duplicates = 0
        self._began, self._flop_per_s = now, flop_per_s
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._recent = deque([Snapshot(now, 0, 0.0)], maxlen=RECENT + 1)

    @property
    def positions(self) -> int:
        """Positions that were run through the model."""
        return self._recent[-1].positions

    def add(self, report: UnitReport, now: float) -> None:
        """Counts one more finished unit."""
        last = self._recent[-1]
        self._recent.append(Snapshot(now, last.positions + report.positions, last.flop + report.flop))
        self.units += 1
        self.rows += report.rows
        self.outliers += report.outliers
        self.nonfinite += report.nonfinite
        self.duplicates += report.duplicate
        for part, seconds_of in PARTS.items():
            self._seconds[part] += seconds_of(report)

    @property
    def tokens_per_second(self) -> float:
        """Over its last units; 0 before the first."""
        first, last = self._recent[0], self._recent[-1]
        return (last.positions - first.positions) / (last.time - first.time) if last.time > first.time else 0.0

    @property
    def utilisation(self) -> float:
        """FLOP of the forward passes, as a share of what plain matrix products would reach in that time."""
        first, last = self._recent[0], self._recent[-1]
        possible = self._flop_per_s * (last.time - first.time)
        return (last.flop - first.flop) / possible if possible else 0.0

    def blocked_s(self) -> float:
        """Seconds that its model waited for storage."""
        return self._seconds["blocked"]

    def facts(self) -> dict[str, float]:
        """Rates, and the shares of its time since it was ready: they overlap, so they may add up to more than 1."""
        seconds = max(self._recent[-1].time - self._began, 1e-9)
        return {
            "units": self.units,
            "tokens_per_second": self.tokens_per_second,
            "utilisation": self.utilisation,
            **{part: spent / seconds for part, spent in self._seconds.items()},
        }


def remaining_s(replicas: Sequence[Throughput], *, units_left: int) -> float | None:
    """Seconds that `units_left` will take; None before the first unit is done."""
    rate = sum(replica.tokens_per_second for replica in replicas)
    units = sum(replica.units for replica in replicas)
    if not rate or not units:
        return None
    return units_left * sum(replica.positions for replica in replicas) / units / rate


def slow_process(delays: Mapping[tuple[int, int], float]) -> tuple[int, int] | None:
    """The (replica, process) that answers much later than the others, or None."""
    if len(delays) < 2:
        return None
    slowest = max(delays, key=lambda process: delays[process])
    others = median(delay for process, delay in delays.items() if process != slowest)
    return slowest if delays[slowest] >= max(SLOW_ANSWER_S, SLOW_RATIO * others) else None


def slow_replica(replicas: Mapping[int, Throughput]) -> int | None:
    """The replica that is much slower than the others, or None; only replicas with two units or more count."""
    rates = {number: each.tokens_per_second for number, each in replicas.items() if each.units >= 2}
    if len(rates) < 2:
        return None
    slowest = min(rates, key=lambda number: rates[number])
    others = median(rate for number, rate in rates.items() if number != slowest)
    return slowest if rates[slowest] < SLOW_RATE * others else None
