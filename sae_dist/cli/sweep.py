"""Many configurations of `train` or `run`: every combination of the values given, trained once, in shared passes.

Any key of the command takes several values: sae.k=16,32 or seed=range(3). Points that want the same rows in the same
batches train in one pass over them. Repeating the command goes on; more values add points and keep the others; several
drivers may work on one sweep. Each point gets a run folder OUT/points/ID, for status, evaluate, pages and export.
Exit code 3: all that could be done is done, and some points failed (retry=failed tries them again).
Example: sae-dist sweep train store=stores/mine sae.n_latents=4096,16384 sae.k=16,32 train.steps=3000 out=sweeps/mine
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from sae_dist.cli import grid
from sae_dist.cli.compose import compose, options
from sae_dist.cli.sweep_view import points_table
from sae_dist.config import UserError, load
from sae_dist.exit_codes import DONE, SOME_FAILED
from sae_dist.service.config import RunConfig, TrainJob
from sae_dist.service.passes import CONFIGS, run_pass
from sae_dist.service.sweep import folder_of, sweep
from sae_dist.sweep.config import SweepJob
from sae_dist.sweep.folder import SweepFolder, read_points
from sae_dist.sweep.point import Point
from sae_dist.sweep.search import Tried, ask

CONFIG = SweepJob
OWN = ("out", "retry", "only", "search", "sweep")  # keys of a sweep; all others are the command's
PASS = "pass"  # `sae-dist sweep pass FOLDER` is the process of a pass, which a driver starts


class Line(NamedTuple):
    """A command line that was read: how to sweep, and what."""

    command: str  # that is swept
    values: dict[str, Any]  # the keys of the sweep itself
    job: SweepJob
    swept: grid.Grid

    def configured(self) -> Iterator[tuple[dict[str, Any], TrainJob | RunConfig]]:
        """Every point's values of the swept keys, and its configuration; UserError for one that cannot be."""
        return _configured(self.command, self.swept, self.swept.points())


def read(arguments: Sequence[str]) -> Line:
    """The command that is swept, and keys of both."""
    command, *overrides = arguments or ("",)
    if command not in CONFIGS:
        raise UserError(
            f"{command or 'nothing'} cannot be swept; write `sae-dist sweep COMMAND key=value ...` with one of "
            f"{', '.join(CONFIGS)}"
        )
    values = compose("sweep", [_listed(each) for each in overrides if _section(each) in OWN])
    job = load(SweepJob, values)
    of_points = [each for each in overrides if _section(each) not in OWN]
    return Line(command, values, job, grid.read(of_points, CONFIGS[command], searched=job.search is not None))


def of_command(arguments: Sequence[str], *, show: bool) -> int:
    """`arguments`: the command that is swept, and keys of both; `show`: says what they make, and does nothing."""
    if arguments[:1] == [PASS]:
        run_pass(Path(arguments[1]))
        return 0
    command, values, job, swept = line = read(arguments)
    if show:
        shown = "".join(f"# {' '.join(point) or 'one point'}\n" for point in swept.points())
        count = len(list(line.configured()))
        print(yaml.safe_dump(values, sort_keys=False) + f"# {count} of `sae-dist {command}`:\n{shown}", end="")
        return 0
    points = work(line, arguments)
    _print(points, folder_of(command, job))
    return SOME_FAILED if any(point.state == "failed" for point in points) else DONE


def work(line: Line, arguments: Sequence[str]) -> list[Point]:
    """What became of the points of a command line, worked on until each is done or failed."""
    command, _, job, swept = line
    if job.search:
        return _search(command, swept, job, arguments)
    return _sweep(command, swept, swept.points(), job, arguments)


def _sweep(
    command: str, swept: grid.Grid, points: Sequence[Sequence[str]], job: SweepJob, line: Sequence[str]
) -> list[Point]:
    asked = _configured(command, swept, points)
    return sweep(command, asked, job, keys=[axis.key for axis in swept.axes], line=line)


def _search(command: str, swept: grid.Grid, job: SweepJob, line: Sequence[str]) -> list[Point]:
    """Sweeps over what Optuna asks for, until there are enough points; all that are over."""
    before = -1
    while True:
        over = _over(swept, folder_of(command, job))
        tried = [Tried(values, point.summary["eval"].get("fvu") if point.summary else None) for point, values in over]
        asked = ask(swept.space(), tried, job.sweep.search)
        if not asked or len(over) == before:  # enough, or nothing was begun: the target is reached
            return [point for point, _ in over]
        before = len(over)
        _sweep(command, swept, [[f"{key}={value}" for key, value in own.items()] for own in asked], job, line)


def _over(swept: grid.Grid, folder: SweepFolder) -> list[tuple[Point, dict[str, Any]]]:
    """The points of a search that are done or failed, with their values as it has them."""
    found = []
    for point in read_points(folder.path) if folder.about() else ():
        values = {axis.key: axis.within(point.overrides.get(axis.key)) for axis in swept.axes}
        if point.state in ("done", "failed") and None not in values.values():
            found.append((point, values))
    return found


def _configured(
    command: str, swept: grid.Grid, points: Sequence[Sequence[str]]
) -> Iterator[tuple[dict[str, Any], TrainJob | RunConfig]]:  # fmt: skip
    """Every point's values of the swept keys, and its configuration without the folder that it gets.

    Hydra takes a fifth of a second to compose one. So it does that once for every combination of groups, and the values
    of other keys are put in.
    """
    config, fixed = CONFIGS[command], list(swept.fixed)
    if command == "run":
        if any(_section(each) == "pages" for each in [*fixed, *(axis.key for axis in swept.axes)]):
            raise UserError("pages= is of one dictionary; write them afterwards: sae-dist pages OUT/points/ID")
        fixed.append("pages=null")
    groups = {axis.key for axis in swept.axes if options(axis.key, config)}
    first = {_key(each): each for each in points[0]} if points else {}
    composed: dict[tuple[str, ...], dict[str, Any]] = {}
    for point in points:
        chosen = tuple(each if _key(each) in groups else first[_key(each)] for each in point)
        if chosen not in composed:
            composed[chosen] = compose(command, [*fixed, *chosen])
        values = copy.deepcopy(composed[chosen])
        given = {_key(each): grid.value(each) for each in point}
        for key, value in given.items():
            if key not in groups:
                _put(values, key, value)
        yield given, load(config, values)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values[part]
    values[last] = value


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _section(override: str) -> str:
    """The first part of an override's key."""
    return _key(override).partition(".")[0]


def _listed(override: str) -> str:
    """only=ID,ID is a list, not a sweep."""
    key, _, value = override.partition("=")
    if key != "only" or value[:1] == "[" or value == "null":
        return override
    return f"only=[{','.join(repr(part) for part in value.split(','))}]"


def _print(points: Sequence[Point], folder: SweepFolder) -> None:
    """A row a point with what was measured, and why points failed."""
    console = Console()
    console.print(f"sweep {folder.path.name}", highlight=False, markup=False)
    console.print(points_table(points))
    for point in points:
        if point.state == "failed":
            console.print(f"{point.id} failed: {point.failure}", soft_wrap=True, highlight=False, markup=False)
    for part in ("points", "report/index.html"):
        console.print(f"{part.partition('/')[0]}: {folder.path / part}", soft_wrap=True, highlight=False, markup=False)
