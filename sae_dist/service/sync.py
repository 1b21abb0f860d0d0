"""A run's W&B runs made anew from its folder: config.yaml says what it is, metrics.jsonl what it said.

Of a sweep it is the report; its points are runs of their own.
"""

import os
from pathlib import Path
from typing import NamedTuple

from sae_dist.config import UserError, frozen, load, local_folder
from sae_dist.monitor.config import Mode, WandbConfig
from sae_dist.monitor.sync import offline_folders, sync
from sae_dist.monitor.tracked import TrackedRun
from sae_dist.service.config import HarvestJob, RunConfig, TrainJob
from sae_dist.service.monitoring import last_start, tracked_runs
from sae_dist.service.run_folder import read_config
from sae_dist.service.sweep_report import send_again
from sae_dist.sweep.folder import SweepFolder, read_points
from sae_dist.train.members import MAIN


@frozen
class SyncWandb:
    """Where the history goes; null: where WANDB_MODE says, or where the run's own went."""

    mode: Mode | None = None  # offline: into <out>/wandb, for `wandb sync`; online: to the server; null: as the run
    project: str | None = None  # null: the run's
    entity: str | None = None  # null: the run's
    group: str | None = None  # null: the run's


@frozen
class SyncConfig:
    """A run's folder -> its history in W&B; a sweep's folder -> its report there."""

    out: str  # the folder of a run or of a sweep
    wandb: SyncWandb = SyncWandb()

    def __post_init__(self) -> None:
        local_folder("out", self.out)


class Synced(NamedTuple):
    """What was made: the runs, and the folders that hold them where the mode is offline."""

    wandb: WandbConfig
    runs: list[TrackedRun]
    folders: list[Path]


def sync_run(config: SyncConfig) -> Synced:
    """All dictionaries of the run, its harvest and its evaluations, each under the identity that it had at work."""
    out, sweep = Path(config.out), SweepFolder(Path(config.out).absolute())
    values = read_config(out if sweep.about() is None else _point(sweep))
    given = {key: value for key, value in vars(config.wandb).items() if value is not None}
    if "mode" not in given and os.environ.get("WANDB_MODE"):
        given["mode"] = None  # which is read from there
    try:
        values["wandb"] = values["wandb"] | given
        kind = RunConfig if {"model", "sae"} <= values.keys() else TrainJob if "sae" in values else HarvestJob
        job = load(kind, values)
    except (UserError, KeyError, TypeError) as wrong:
        raise UserError(f"{out / 'config.yaml'} is damaged: {wrong}") from None
    if job.wandb.mode == "disabled":
        raise UserError(f"out={out}: wandb.mode=disabled sends nothing; give wandb.mode=offline or wandb.mode=online")
    if sweep.about() is not None:
        before = offline_folders(sweep.path)
        run = send_again(sweep, job.wandb)
        return Synced(job.wandb, [run], [path for path in offline_folders(sweep.path) if path not in before])
    begun = last_start(out)
    runs = tracked_runs(
        job, out=begun["out"], config_hash=begun["config_hash"], main=begun.get("member", MAIN)
    )  # fmt: skip
    return Synced(job.wandb, runs, sync(out.absolute(), job.wandb, runs))


def _point(sweep: SweepFolder) -> Path:
    """The folder of a point that is done: how it was tracked is how the sweep is."""
    for point in read_points(sweep.path):
        if point.state == "done":
            return sweep.point(point.id)
    raise UserError(f"out={sweep.path} is a sweep in which no point is done yet; there is nothing to send")
