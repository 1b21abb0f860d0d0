"""A sweep: the points that are asked for, worked on until each is done or failed, here or by another driver."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sae_dist import storage
from sae_dist.config import Stopped, UserError
from sae_dist.monitor.config import public_arguments
from sae_dist.service.config import RunConfig, TrainJob
from sae_dist.service.display import Display
from sae_dist.service.signals import catch_signals
from sae_dist.service.sweep_driver import EVERY_S, Driver
from sae_dist.service.sweep_points import Planned, planned
from sae_dist.service.sweep_report import report
from sae_dist.service.sweep_room import measured, slots
from sae_dist.sweep.config import SweepJob
from sae_dist.sweep.folder import SweepFolder, read_points
from sae_dist.sweep.ledger import driving
from sae_dist.sweep.point import Point


def folder_of(command: str, job: SweepJob) -> SweepFolder:
    return SweepFolder(Path(job.out or f"sweeps/{command}").absolute())


def sweep(
    command: str, asked: Iterable[tuple[Mapping[str, Any], TrainJob | RunConfig]], job: SweepJob, *,
    keys: Sequence[str], line: Sequence[str],
) -> list[Point]:  # fmt: skip
    """What became of the configurations that are asked for, each with its values of the swept `keys`.

    `line`: the arguments that made them, for sweep.json. Writes the report, on all points of the sweep. Stopped, after
    all passes have saved, when asked to stop; UserError before anything is written.
    """
    folder = folder_of(command, job)
    points = planned(command, asked, folder)
    if job.only is not None:
        points = [each for each in points if _is_chosen(each, job.only)]
    if not points:
        raise UserError(f"only={','.join(job.only or ())} is none of the points that the keys make")
    slots(job.sweep, points[0].config)  # a budget that holds no pass is refused before anything is written
    folder.check(command)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.open(command, keys, public_arguments(line))
    before = read_points(folder.path)
    try:
        done = _drive(command, points, folder, job)
    except Stopped:
        report(folder, job, before, points[0].config.wandb)
        raise
    report(folder, job, before, points[0].config.wandb)
    return done


def _drive(command: str, points: Sequence[Planned], folder: SweepFolder, job: SweepJob) -> list[Point]:
    places = slots(job.sweep, points[0].config)
    memory = measured(job.sweep, places, points[0].config.cluster)
    with (
        driving(storage.open(folder.path)) as ledger,
        Display(str(folder.path)) as display,
        catch_signals() as request,
        ExitStack() as held,
    ):
        driver = Driver(
            command, points, folder, job.sweep, ledger=ledger, places=places, memory=memory,
            retry=job.retry == "failed", check=request.check,
        )  # fmt: skip
        held.callback(driver.close)
        while not driver.step():
            display.update("sweep", driver.counts())
            for name, facts in driver.facts().items():
                display.update(name, facts)
            time.sleep(EVERY_S)
        display.update("sweep", driver.counts(), now=True)
        return driver.points()


def _is_chosen(point: Planned, only: Sequence[str]) -> bool:
    """Whether an id, or all of the values, of `only` are those of the point."""
    values = [each.partition("=") for each in only if "=" in each]
    of_values = bool(values) and all(str(point.overrides.get(key)) == value for key, _, value in values)
    return of_values or any("=" not in each and point.id.startswith(each) for each in only)
