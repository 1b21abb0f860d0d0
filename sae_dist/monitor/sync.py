"""A tracker's history made anew from metrics.jsonl: what it has missed, or all of it."""

from collections.abc import Sequence
from pathlib import Path

from sae_dist.config import UserError
from sae_dist.monitor.config import WandbConfig
from sae_dist.monitor.tracked import TrackedRun
from sae_dist.monitor.tracker_process import TrackerProcess, wandb_options

TIMEOUT_S = 3600.0


def sync(out: Path, wandb: WandbConfig, runs: Sequence[TrackedRun]) -> list[Path]:
    """Gives W&B everything that metrics.jsonl has; the folders that it left there, of a mode that is offline.

    UserError when it did not take everything.
    """
    before = set(offline_folders(out))
    process = TrackerProcess("wandb", wandb_options(wandb, out), metrics=out / "metrics.jsonl", runs=runs)
    if reason := process.finish(TIMEOUT_S):
        raise UserError(f"W&B did not take the history of {out} ({reason}); {out / 'wandb.log'} has more")
    return sorted(set(offline_folders(out)) - before)


def offline_folders(out: Path) -> list[Path]:
    """What W&B has left in a run's folder for `wandb sync`."""
    return list((out / "wandb").glob("offline-run-*"))
