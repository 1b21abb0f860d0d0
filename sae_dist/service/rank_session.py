"""The training of one rank, with its logs and its folder, in this process or in a Ray actor."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from sae_dist import storage
from sae_dist.config import Stopped, UserError
from sae_dist.config import load as load_config
from sae_dist.locks import file_lock
from sae_dist.monitor.metrics import JsonLines, Log, tee
from sae_dist.service.config import TrainJob, names
from sae_dist.service.devices import device_of_actor
from sae_dist.service.parent_watch import exit_with_parent
from sae_dist.service.placement import Bundle
from sae_dist.service.summary import alerts
from sae_dist.shards import stores
from sae_dist.shards.hooks import Hooks, check
from sae_dist.shards.reader import Store
from sae_dist.shards.slice_cache import SliceCache
from sae_dist.system_errors import user_error
from sae_dist.train.loop import Trained, train
from sae_dist.train.parallel.collectives import ranks_on_this_machine
from sae_dist.train.parallel.mesh_session import MeshSession, mesh_session
from sae_dist.train.parallel.rendezvous import Rendezvous
from sae_dist.train.task import Task

logger = logging.getLogger(__name__)


def chosen_hooks(store: Store, job: TrainJob) -> Hooks:
    """`job.hook`, or the store's only hook point if it is None, and the target: perhaps `job.target_hook`.

    UserError when one does not exist, is named twice or has to be chosen.
    """
    there = tuple(store.meta.hooks)
    if job.hook is None and len(there) > 1:
        raise UserError(f"hook=null of store={store.storage.uri}; choose one of {', '.join(there)}, or a list of them")
    hooks = Hooks(names(job.hook or there), names(job.target_hook or ()))
    for key, side in (("hook", hooks.reads), ("target_hook", hooks.writes)):
        for name in side:
            if name not in there:
                raise UserError(f"{key}={name} of store={store.storage.uri}; choose one of {', '.join(there)}")
    if hooks.writes and hooks.rebuilds_input:
        raise UserError(
            f"target_hook={job.target_hook} is the only hook point of store={store.storage.uri}; leave it out"
        )
    check(hooks, store.meta, store.storage.uri)
    return hooks


def check_heldout(store: Store) -> None:
    """UserError when held-out units are missing: before hours of training rather than after."""
    if missing := _missing_heldout(store):
        raise UserError(
            f"store={store.storage.uri} lacks {len(missing)} of its {store.meta.heldout_units} held-out units (unit "
            f"{missing[0]} first); repeat the command that harvests it, or follow it with live=true"
        )


def wait_for_heldout(store: Store, stop: Callable[[], bool], *, stall_s: float = 3600.0) -> None:
    """Waits until a running harvest has committed all held-out units; Stopped once `stop()`, UserError if it stalls."""
    missing, heard = _missing_heldout(store), time.monotonic()
    if missing:
        logger.info("trained; waiting for %d held-out units of the harvest", len(missing))
    while missing:
        if stop():
            raise Stopped("the training is done and saved; the held-out units are not there yet")
        if time.monotonic() - heard > stall_s:
            raise UserError(
                f"store={store.storage.uri} has lacked unit {missing[0]}, held out, for {stall_s:.0f} s; is its "
                "harvest still running? (sae-dist store ls shows what is there)"
            )
        time.sleep(1.0)
        still = _missing_heldout(store)
        missing, heard = still, heard if len(still) == len(missing) else time.monotonic()


def _missing_heldout(store: Store) -> list[int]:
    return [u for u in range(store.meta.train_units, store.meta.n_units) if store.commit(u) is None]


def run_rank(
    job: TrainJob,
    rank: MeshSession,
    *,
    provenance: Mapping[str, Any],
    stop: Callable[[], bool],
    watch: Log | None = None,
) -> Trained:
    """Trains to the end, or to the first step after `stop`; all ranks of the mesh call this.

    The first one's figures go to metrics.jsonl and `watch`.
    """
    torch.set_num_threads(job.train.threads or max(usable_cores() // ranks_on_this_machine(rank.mesh), 1))
    cache = None if job.train.cache is None else SliceCache(Path(job.train.cache), limit_bytes=job.train.cache_bytes)
    out, store = Path(job.out), stores.open(storage.open(job.store), cache=cache)
    out.mkdir(parents=True, exist_ok=True)
    meta = store.meta
    origin = {"model": meta.model, "model_fingerprint": meta.model_fingerprint, "tokenizer": meta.tokenizer}
    origin |= {"store": job.store, "text_fingerprint": meta.text_fingerprint}
    # a trainer may outlive its killed driver by a moment
    alone = file_lock(out / ".training", waiting=f"another process still trains into {out}; waiting until it has ended")
    with alone if rank.mesh.is_rank_0 else nullcontext(), _logs(job, out, rank.mesh.is_rank_0, watch) as log:
        task = Task(
            store, hooks=chosen_hooks(store, job), members=job.members, config=job.train, order=job.order,
            seed=job.seed, out=out, live=job.live, provenance={**origin, **provenance},
            checkpoint_timeout_s=job.mesh.checkpoint_timeout_s,
        )  # fmt: skip
        return train(task, rank.mesh, log=log, stop=stop, set_phase=rank.set_phase)


@contextmanager
def _logs(job: TrainJob, out: Path, first: bool, watch: Log | None) -> Iterator[Log]:
    """The Log of rank 0: metrics.jsonl, W&B and `watch`; other ranks log nothing."""
    if not first:
        yield tee()
        return
    with closing(JsonLines(out / "metrics.jsonl")) as lines:
        yield alerting(lines if watch is None else tee(lines, watch), job)


def alerting(log: Log, job: TrainJob) -> Log:
    """`log` that adds a key `alert` to the line at which a dictionary's figures turn bad.

    FVU counts in the second half of the steps only: it may begin above 1.
    """
    amiss: set[str] = set()

    def checked(step: int, figures: Mapping[str, Any]) -> None:
        more = {}
        for member in job.members:
            own = {key: figures.get(f"{member.prefix}{key}") for key in ("l0", "fvu")}
            if 2 * step < job.train.n_steps:
                own["fvu"] = None
            found, key = alerts(own), f"{member.prefix}alert"
            if found and member.name not in amiss and key not in figures:
                more[key] = f"step {step}: {'; '.join(found)}"
                logger.error("ALERT: %s%s", member.prefix, more[key])
            amiss.add(member.name) if found else amiss.discard(member.name)
        log(step, {**figures, **more})

    return checked


def usable_cores() -> int:
    """The number of cores that this process may use, as limited by Slurm or a container."""
    return len(os.sched_getaffinity(0))


class RankActor:
    """The Ray actor of a rank, which reserves `bundle`; needs max_concurrency=2, so that `stop` runs beside `train`."""

    def __init__(
        self,
        values: Mapping[str, Any],
        provenance: Mapping[str, Any],
        *,
        rank: int,
        rendezvous: Rendezvous | None,
        bundle: Bundle,
    ) -> None:
        exit_with_parent()
        self._job, self._provenance = load_config(TrainJob, values), provenance
        self._rank, self._rendezvous, self._bundle = rank, rendezvous, bundle
        self._stop = threading.Event()

    def train(self) -> Trained | None:
        """Trains to the end; None when it was asked to stop before. The store may still be growing."""
        mesh = self._job.mesh
        try:
            world = mesh.data * mesh.feature
            device = device_of_actor(self._bundle)
            with mesh_session(mesh, self._rendezvous, rank=self._rank, world=world, device=device) as rank:
                return run_rank(self._job, rank, provenance=self._provenance, stop=self._stop.is_set)
        except Stopped:
            return None
        except (OSError, MemoryError, RuntimeError) as error:  # Ray hands on what a user can cure as what it is
            if (refused := user_error(error)) is not None:
                raise refused from error
            raise

    def stop(self) -> None:
        """Asks `train` to save and return after the current step."""
        self._stop.set()
