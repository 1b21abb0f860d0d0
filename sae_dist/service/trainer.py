"""Training as a job: the loop with its logs and its folder, in this process or in an actor."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_dist import storage
from sae_dist.config import Stopped, UserError, to_dict
from sae_dist.config import load as load_config
from sae_dist.monitor import JsonLines, Log, WandbMirror, tee
from sae_dist.service.config import TrainJob
from sae_dist.shards import reader
from sae_dist.shards.reader import Store
from sae_dist.train.loop import Trained, train


class TrainReport(NamedTuple):
    """A finished training in plain values, or one that stopped on request."""

    finished: bool
    steps: int = 0
    tokens: int = 0
    order_hash: str = ""
    seconds: float = 0.0
    note: str = ""


def chosen_hook(store: Store, hook: str | None) -> str:
    """`hook`, or the store's only one; UserError when it has not that one, or several to choose from."""
    there = list(store.meta.hooks)
    if hook is None and len(there) == 1:
        return there[0]
    if hook not in there:
        raise UserError(f"hook={hook} of store={store.storage.uri}; choose one of {', '.join(there)}")
    return hook


def run_training(
    job: TrainJob, *, live: bool, provenance: Mapping[str, Any], stop: Callable[[], bool], watch: Log | None = None
) -> Trained:
    """Trains to the end, or to the first step after `stop`; figures go to metrics.jsonl, W&B and `watch`."""
    torch.set_num_threads(job.train.threads or os.cpu_count() or 1)
    out, store = Path(job.out), reader.open(storage.open(job.store))
    lines = JsonLines(out / "metrics.jsonl")
    logs: list[Log] = [lines, *([watch] if watch else [])]
    mirror = None
    if job.wandb.mode != "disabled":
        mirror = WandbMirror(job.wandb, out=out, name=out.name, run_config=to_dict(job))
        logs.append(mirror)
    try:
        return train(
            store, hook=chosen_hook(store, job.hook), sae=job.sae, config=job.train, order=job.order, seed=job.seed,
            out=out, log=tee(*logs), live=live, stop=stop,
            provenance={"model": store.meta.model, "store": job.store, **provenance},
        )  # fmt: skip
    finally:
        lines.close()
        if mirror is not None:
            mirror.close()


class Trainer:
    """The actor's class; needs max_concurrency=2, so that `stop` is heard while `train` works."""

    def __init__(self, values: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self._job, self._provenance = load_config(TrainJob, values), provenance
        self._stop = threading.Event()

    def train(self) -> TrainReport:
        """Trains on a store that may still be growing."""
        try:
            done = run_training(self._job, live=True, provenance=self._provenance, stop=self._stop.is_set)
        except Stopped as stopped:
            return TrainReport(False, note=str(stopped))
        return TrainReport(True, done.steps, done.tokens, done.order_hash, done.seconds)

    def stop(self) -> None:
        """Asks `train` to save and return after its present step."""
        self._stop.set()
