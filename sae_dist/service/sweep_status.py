"""What a sweep is doing, as its ledger and the folders of its passes say."""

import shlex
from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from sae_dist import storage
from sae_dist.service.findings import Finding, damaged
from sae_dist.service.run_list import folders_with, read_runs
from sae_dist.service.run_progress import progress
from sae_dist.service.run_status import RunStatus
from sae_dist.storage import Storage
from sae_dist.sweep.folder import SWEEP, read_about, read_points
from sae_dist.sweep.point import Point


class SweepStatus(NamedTuple):
    """Its points, and the passes that train them now."""

    place: str
    points: Sequence[Point]
    passes: Sequence[RunStatus]  # that a process works on
    command: str  # that was given last
    damage: Sequence[str]  # a line for every file that is not what was written: which, and the cure

    @property
    def counts(self) -> dict[str, int]:
        """Points by state."""
        return dict(Counter(point.state for point in self.points))

    @property
    def over(self) -> bool:
        """Nobody works on it, or there is nothing left to do."""
        return not self.passes and not any(point.state == "leased" for point in self.points)

    @property
    def seconds(self) -> float:
        """Spent on points that are done."""
        return sum(point.seconds or 0.0 for point in self.points)

    @property
    def cost(self) -> float | None:
        known = [point.cost for point in self.points if point.cost is not None]
        return sum(known) if known else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left, if the points to come take as long as those that are done; None before the first one is."""
        took = [point.seconds for point in self.points if point.seconds is not None]
        left = sum(point.state == "pending" for point in self.points)
        if self.over or not took and left:
            return None
        under_way = [part.eta_s for run in self.passes for part in progress(run) if part.eta_s is not None]
        return max(under_way, default=0.0) + (left * mean(took) / max(len(self.passes), 1) if left else 0.0)


def read_sweep(place: Storage, *, retry_s: float) -> SweepStatus | None:
    """The sweep in a folder, or a copy of it on object storage; None where there is none.

    UserError for a record that is damaged.
    """
    about = read_about(place)
    if about is None:
        return None
    damage: list[str] = []
    points = read_points(place, damage=damage)
    working = [run for run in read_runs(storage.open(f"{place.uri}/passes"), retry_s=retry_s) if run.works]
    command = shlex.join(["sae-dist", "sweep", *about["lines"][-1]]) if about["lines"] else ""
    return SweepStatus(place.uri, points, working, command, damage)


def read_sweeps(place: Storage, *, retry_s: float) -> list[SweepStatus]:
    """Every sweep right under the place, by name."""
    places = (storage.open(f"{place.uri}/{name}", retry_s=retry_s) for name in folders_with(place, [SWEEP]))
    return [sweep for each in places if (sweep := read_sweep(each, retry_s=retry_s)) is not None]


def sweep_findings(sweep: SweepStatus) -> list[Finding]:
    """What keeps the sweep from its end."""
    counts, found = sweep.counts, damaged(sweep.damage)
    if (waiting := counts.get("pending", 0)) and sweep.over:
        found.append(Finding(f"nobody works on {waiting} pending points", "the same command goes on", sweep.command))
    for point in sweep.points:
        if point.state == "failed":
            swept = " ".join(f"{key}={value}" for key, value in point.overrides.items())
            found.append(Finding(f"{point.id} failed ({swept}): {point.failure}", ""))
    if counts.get("failed"):
        found.append(Finding("points failed", "after a cure, the same command with retry=failed tries them once more"))
    return found
