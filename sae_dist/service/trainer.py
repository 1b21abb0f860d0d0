"""Training as a job: the loop with its logs and its folder, in this process or in an actor."""

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from sae_dist.train.config import MeshConfig
from sae_dist.train.loop import Trained, train

logger = logging.getLogger(__name__)


class TrainReport(NamedTuple):
    """A finished training in plain values."""

    steps: int
    tokens: int
    order_hash: str
    seconds: float


def chosen_hook(store: Store, hook: str | None) -> str:
    """`hook`, or the store's only one; UserError when it has not that one, or several to choose from."""
    there = list(store.meta.hooks)
    if hook is None and len(there) == 1:
        return there[0]
    if hook not in there:
        raise UserError(f"hook={hook} of store={store.storage.uri}; choose one of {', '.join(there)}")
    return hook


def check_heldout(store: Store) -> None:
    """Refuses a store whose held-out units are not there, before hours of training rather than after."""
    missing = [u for u in range(store.meta.train_units, store.meta.n_units) if store.commit(u) is None]
    if missing:
        raise UserError(
            f"store={store.storage.uri} lacks {len(missing)} of its {store.meta.heldout_units} held-out units (unit "
            f"{missing[0]} first); repeat the command that harvests it"
        )


def check_mesh(mesh: MeshConfig) -> None:
    """Refuses a mesh of several ranks: commands train in one process (train/parallel has the code of all ranks)."""
    if mesh.data * mesh.feature != 1:
        raise UserError(
            f"mesh.data={mesh.data} x mesh.feature={mesh.feature} are {mesh.data * mesh.feature} processes, and this "
            "command starts one; leave both at 1 (`sae-dist plan` takes any mesh)"
        )


def run_training(
    job: TrainJob, *, live: bool, provenance: Mapping[str, Any], stop: Callable[[], bool], watch: Log | None = None
) -> Trained:
    """Trains to the end, or to the first step after `stop`; figures go to metrics.jsonl, W&B and `watch`."""
    torch.set_num_threads(job.train.threads or usable_cores())
    out, store = Path(job.out), reader.open(storage.open(job.store))
    out.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(out / "metrics.jsonl")
    logs: list[Log] = [lines, *([watch] if watch else [])]
    meta = store.meta
    origin = {"model": meta.model, "model_fingerprint": meta.model_fingerprint, "tokenizer": meta.tokenizer}
    origin |= {"store": job.store, "text_fingerprint": meta.text_fingerprint}
    mirror = None
    if job.wandb.mode != "disabled":
        mirror = WandbMirror(job.wandb, out=out, name=out.name, run_config=to_dict(job))
        logs.append(mirror)
    try:
        with _one_trainer(out):
            return train(
                store, hook=chosen_hook(store, job.hook), sae=job.sae, config=job.train, order=job.order, seed=job.seed,
                out=out, log=tee(*logs), live=live, stop=stop, provenance={**origin, **provenance},
            )  # fmt: skip
    finally:
        lines.close()
        if mirror is not None:
            mirror.close()


@contextmanager
def _one_trainer(out: Path) -> Iterator[None]:
    """Waits until no other process trains into `out`: a killed driver's trainer may outlive it by a moment."""
    with (out / ".training").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process still trains into %s; waiting until it has ended", out)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def usable_cores() -> int:
    """The cores that this process may use: in a Slurm slot or a container not all that the machine has."""
    return len(os.sched_getaffinity(0))


class Trainer:
    """The actor's class; needs max_concurrency=2, so that `stop` is heard while `train` works."""

    def __init__(self, values: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self._job, self._provenance = load_config(TrainJob, values), provenance
        self._stop = threading.Event()

    def train(self) -> TrainReport | None:
        """Trains on a store that may still be growing; None when it was asked to stop before the end."""
        try:
            done = run_training(self._job, live=True, provenance=self._provenance, stop=self._stop.is_set)
        except Stopped:
            return None
        return TrainReport(done.steps, done.tokens, done.order_hash, done.seconds)

    def stop(self) -> None:
        """Asks `train` to save and return after its present step."""
        self._stop.set()
