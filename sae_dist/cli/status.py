"""What a run is doing, or what came of it, from its files alone: no process is asked, so it works for dead runs too.

Of a folder of runs and sweeps it is a list, of a sweep a row a point. A run's mirror= can be looked at from anywhere,
and so can a copy of a sweep's folder. watch=true goes on until the run ends.
Examples: sae-dist status runs/quickstart
          sae-dist status s3://bucket/runs/mine watch=true
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sae_dist import storage
from sae_dist.cli.status_view import clock, name_of, one_line, run_view, runs_table
from sae_dist.cli.sweep_view import sweep_line, sweep_view
from sae_dist.config import UserError, frozen, load
from sae_dist.service.findings import Checkpoint, Disk, findings
from sae_dist.service.run_list import read_runs
from sae_dist.service.run_progress import figures, progress
from sae_dist.service.run_status import RunStatus, read_run
from sae_dist.service.sweep_status import SweepStatus, read_sweep, read_sweeps, sweep_findings
from sae_dist.storage import StorageError
from sae_dist.sweep.folder import SWEEP
from sae_dist.train.checkpoint_folders import MANIFEST, folders, step_of

POSITIONAL = ("out",)
RETRY_S = 15.0  # a storage that fails for longer does not answer


@frozen
class StatusConfig:
    """What to look at, and how."""

    out: str = "runs"  # the folder of a run, of a sweep or of several; or where a copy of one is: s3://bucket/prefix
    watch: bool = False  # look again and again, until the run ends or Ctrl-C
    every: Annotated[float, Field(gt=0)] = 2.0  # seconds between two looks
    json: bool = False  # one JSON object, for scripts

    def __post_init__(self) -> None:
        if self.json and self.watch:
            raise ValueError("json=true and watch=true: give one of them; a script repeats the command with json=true")


CONFIG = StatusConfig


class View(NamedTuple):
    """What was seen: for a person, in a line, and as values; `over` once nothing there works any more."""

    shown: RenderableType
    line: str
    values: dict[str, Any]
    over: bool


def main(values: Mapping[str, Any]) -> int:
    config = load(StatusConfig, values)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400  # for other programs: one line is one line
    if config.json:
        print(json.dumps(_look(config.out, console).values, indent=2))
    elif config.watch:
        _watch(config, console)
    else:
        console.print(_look(config.out, console).shown, soft_wrap=True)
    return 0


def _watch(config: StatusConfig, console: Console) -> None:
    """Until nothing works any more there, or Ctrl-C; where nobody looks on, a line whenever something changed."""
    view = _look(config.out, console)
    try:
        if not console.is_terminal:
            said = ""
            while not view.over:
                if view.line != said:
                    said = view.line
                    console.print(f"{clock()}  {said}")
                time.sleep(config.every)
                view = _look(config.out, console)
            console.print(view.shown, soft_wrap=True)
            return
        with Live(view.shown, console=console, auto_refresh=False) as live:
            while not view.over:
                time.sleep(config.every)
                view = _look(config.out, console)
                live.update(view.shown, refresh=True)
    except KeyboardInterrupt:
        pass


def _look(where: str, console: Console) -> View:
    """At a run or a folder of runs; UserError where there is nothing to read."""
    place = storage.open(where, retry_s=RETRY_S)
    if (run := read_run(place)) is not None:
        return _run(run, console)
    if (sweep := read_sweep(place, retry_s=RETRY_S)) is not None:
        return _sweep(sweep, console)
    runs, sweeps = read_runs(place, retry_s=RETRY_S), read_sweeps(place, retry_s=RETRY_S)
    if runs or sweeps:
        return _several(place.uri, runs, sweeps)
    raise UserError(
        f"out={where} holds no run and no sweep, and no folder with one (no status.json, no {SWEEP}); give the folder "
        "of a run or of a sweep"
    )


def _run(run: RunStatus, console: Console) -> View:
    damage, checkpoint = (), None
    try:
        checkpoint = newest_checkpoint(run)
    except (StorageError, OSError) as error:
        damage = (f"the checkpoints cannot be listed: {error}",)
    run = run._replace(damage=(*run.damage, *damage))
    found = findings(run, checkpoint=checkpoint, disk=disk_of(run))
    values = values_of(run) | {
        "checkpoint": None if checkpoint is None else checkpoint._asdict(),
        "findings": [finding._asdict() for finding in found],
    }
    return View(run_view(run, found, checkpoint, console), one_line(run), {"kind": "run"} | values, not run.works)


def _several(place: str, runs: Sequence[RunStatus], sweeps: Sequence[SweepStatus]) -> View:
    """A row a run, then a line a sweep."""
    states = [run.state for run in runs]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    lines = [f"{name_of(sweep.place)}: {sweep_line(sweep)}" for sweep in sweeps]
    values = {
        "kind": "runs", "place": place, "runs": [values_of(run) for run in runs],
        "sweeps": [{"place": each.place, "counts": each.counts, "over": each.over} for each in sweeps],
    }  # fmt: skip
    over = not any(run.works for run in runs) and all(sweep.over for sweep in sweeps)
    shown = Group(*([runs_table(runs)] if runs else []), *(Text(f"sweep {line}") for line in lines))
    return View(shown, ", ".join([*counted, *lines]), values, over)


def _sweep(sweep: SweepStatus, console: Console) -> View:
    found = sweep_findings(sweep)
    values = {
        "kind": "sweep", "place": sweep.place, "counts": sweep.counts, "seconds": sweep.seconds, "cost": sweep.cost,
        "eta_s": sweep.eta_s, "points": [dataclasses.asdict(point) for point in sweep.points],
        "passes": [values_of(run) for run in sweep.passes], "findings": [finding._asdict() for finding in found],
    }  # fmt: skip
    return View(sweep_view(sweep, found, console), sweep_line(sweep), values, sweep.over)


def newest_checkpoint(run: RunStatus) -> Checkpoint | None:
    """None where there is none, or where it cannot be seen from here: beside another machine's run."""
    place = (run.config.get("train") or {}).get("checkpoints")
    if place is None or (run.claimed is None and not str(place).startswith("s3://")):
        if run.claimed is None:
            return None
        place = f"{run.place}/checkpoints"
    there = storage.open(str(place), retry_s=RETRY_S)
    for folder in folders(there):
        for entry in there.list(f"{folder}/{MANIFEST}"):
            return Checkpoint(step_of(folder), entry.mtime)
    return None


def disk_of(run: RunStatus) -> Disk | None:
    """Of a run on this machine."""
    if run.claimed is None or not Path(run.place).is_dir():
        return None
    usage = shutil.disk_usage(run.place)
    return Disk(usage.free, usage.total)


def values_of(run: RunStatus) -> dict[str, Any]:
    """A run for a script; times in seconds, `age_s` since it last wrote its status."""
    parts = {part.name: part._asdict() | {"share": round(part.share, 4)} for part in progress(run)}
    return {
        "place": run.place, "state": run.state, "phase": run.phase, "works": run.works, "age_s": run.age_s,
        "progress": parts, "figures": figures(run), "command": run.command, "damage": list(run.damage),
        "status": dict(run.said), "summary": run.summary,
    }  # fmt: skip
