"""A sweep's report: written into its folder, and shown in W&B."""

import logging
from collections.abc import Sequence

from sae_dist.config import UserError
from sae_dist.monitor.config import WandbConfig
from sae_dist.monitor.tracked import TrackedRun, run_id
from sae_dist.monitor.wandb_report import send_report
from sae_dist.sweep.config import SweepJob
from sae_dist.sweep.folder import SweepFolder, read_points
from sae_dist.sweep.point import Point
from sae_dist.sweep.report import write_report

logger = logging.getLogger(__name__)


def report(folder: SweepFolder, job: SweepJob, before: Sequence[Point], wandb: WandbConfig) -> None:
    """Writes the report and sends it, unless there is one of the same points and no other size is asked for."""
    points, goal = read_points(folder.path), job.sweep.extrapolate_to
    if points == before and goal is None and (folder.report / "index.html").exists():
        return
    write_report(points, folder.report, title=folder.path.name, extrapolate_to=goal)
    if wandb.mode != "disabled" and (reason := _send(folder, wandb)):
        cure = f"`sae-dist sync {folder.path}` sends it"
        logger.warning("W&B did not get the sweep's report (%s); %s, and %s", reason, cure, _log(folder))


def tracked(folder: SweepFolder, wandb: WandbConfig) -> TrackedRun:
    """What trackers call the sweep, at every start and from whatever folder its command is given."""
    name, about = folder.path.name, dict(folder.about() or {})
    hashed = run_id(out=str(folder.path), config_hash="", job_type="sweep", member="")
    return TrackedRun(hashed, f"{name}-sweep", wandb.group or name, "sweep", "", about)


def send_again(folder: SweepFolder, wandb: WandbConfig) -> TrackedRun:
    """Sends the report that is there; UserError when there is none, or when W&B does not take it."""
    if not (folder.report / "index.html").exists():
        raise UserError(f"{folder.path} has no report yet; repeat the sweep's command, which writes it when it ends")
    if reason := _send(folder, wandb):
        raise UserError(f"W&B did not take the report of {folder.path} ({reason}); {_log(folder)}")
    return tracked(folder, wandb)


def _send(folder: SweepFolder, wandb: WandbConfig) -> str:
    return send_report(folder.report, tracked(folder, wandb), wandb, out=folder.path)


def _log(folder: SweepFolder) -> str:
    return f"{folder.path / 'wandb.log'} has more"
