"""The folder of a sweep, and its points as the ledger and their own folders say.

sweep.json          the command, the swept keys, the command lines that were given
ledger/             who works on which point, and what came of it (ledger.py)
points/<id>/        the run folder of a point that is done, as its command leaves it
passes/<id>/        the run folder of a pass, and what its process said (pass.log)
rungs/<id>-<steps>/ the run folder of a point that was trained for fewer steps, to be compared (halving.py)
stores/<id>/        activations that the sweep itself has harvested
report/             plots and tables of all points
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.run_files import parse_json, write_json
from sae_dist.storage import Storage
from sae_dist.sweep.ledger import Ledger
from sae_dist.sweep.point import Point

SWEEP = "sweep.json"


class About(TypedDict):
    """sweep.json."""

    command: str
    keys: list[str]  # that were swept
    lines: list[list[str]]  # arguments that were given, the first ones first


class SweepFolder(NamedTuple):
    """Where everything lies."""

    path: Path

    def point(self, point: str) -> Path:
        return self.path / "points" / point

    def rung(self, point: str, steps: int) -> Path:
        return self.path / "rungs" / f"{point}-{steps}"

    def pass_(self, name: str) -> Path:
        return self.path / "passes" / name

    def store(self, name: str) -> Path:
        return self.path / "stores" / name

    @property
    def report(self) -> Path:
        return self.path / "report"

    def about(self) -> About | None:
        """sweep.json; None where no sweep was started here."""
        return read_about(storage.open(self.path))

    def check(self, command: str) -> About:
        """sweep.json as it is, or is to begin; UserError where the folder holds something else."""
        there = self.about()
        if there is None:
            if (self.path / "config.yaml").exists():
                raise UserError(f"out={self.path} holds a run, not a sweep; choose another out=")
            return About(command=command, keys=[], lines=[])
        if there["command"] != command:
            raise UserError(f"out={self.path} holds a sweep of {there['command']}; choose another out= for {command}")
        return there

    def open(self, command: str, keys: Sequence[str], line: Sequence[str]) -> None:
        """Keeps the swept keys and the command line in sweep.json."""
        there = self.check(command)
        now = About(
            command=command, keys=[*there["keys"], *(key for key in keys if key not in there["keys"])],
            lines=there["lines"] if list(line) in there["lines"] else [*there["lines"], list(line)],
        )  # fmt: skip
        if now != there:
            write_json(self.path / SWEEP, now)


def read_about(place: Storage) -> About | None:
    """sweep.json of a sweep, or of a copy of one on object storage; None where there is none."""
    try:
        data = bytes(place.read(SWEEP))
    except (FileNotFoundError, NotADirectoryError):
        return None
    cure = "remove it, and repeat the sweep's command, which writes it"
    return parse_json(data, About, name=f"{place.uri}/{SWEEP}", cure=cure)


def read_points(out: Path | Storage, *, damage: list[str] | None = None) -> list[Point]:
    """Every point of the sweep in `out`, by its overrides; UserError where there is no sweep.

    A summary that is damaged is a UserError, too, or else a line in `damage`.
    """
    place, points = storage.open(out) if isinstance(out, Path) else out, []
    if read_about(place) is None:
        raise UserError(f"out={place.uri} holds no sweep (no {SWEEP})")
    ledger = Ledger(place)
    ledger.refresh()
    for point, described in ledger.points.items():
        try:
            points.append(of_ledger(ledger, place, point))
        except UserError as error:
            if damage is None or isinstance(error, storage.Unavailable):
                raise
            damage.append(str(error))
            points.append(Point(point, described.overrides, "done", ledger.tries(point)))
    return sorted(points, key=lambda point: [_order(value) for value in point.overrides.values()])


def of_ledger(ledger: Ledger, place: Storage, point: str) -> Point:
    """A point as the ledger and its folder say; one that was done, and whose folder is gone, is pending."""
    state, ends = ledger.state(point), ledger.ends(point)
    summary = _summary(place, point) if state == "done" else None
    if state == "done" and summary is None:
        state = "pending"
    last = ends[-1] if state == "done" else None
    return Point(
        id=point, overrides=ledger.points[point].overrides, state=state, tries=ledger.tries(point),
        seconds=last and last.seconds, cost=last and last.cost, summary=summary,
        stopped_at=last and last.stopped_at, stopped_why=last and last.stopped_why,
        failure=None if last else next((ended.failure for ended in reversed(ends) if ended.failure), None),
    )  # fmt: skip


def _summary(place: Storage, point: str) -> dict[str, Any] | None:
    key, cure = (
        f"points/{point}/summary.json",
        "remove the point's folder, and repeat the command, which makes it again",
    )
    try:
        data = bytes(place.read(key))
    except FileNotFoundError:
        return None
    return parse_json(data, dict[str, Any], name=f"{place.uri}/{key}", cure=cure)


def _order(value: object) -> tuple[int, float, str]:
    """Numbers by size, before words."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, re.sub(r"\d+", lambda found: found[0].zfill(12), str(value))
