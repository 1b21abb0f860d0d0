"""A worker of Ray Train: trains as one rank, as under torchrun, on a mesh of as many workers as there are.

UserError (Unavailable, too) and Stopped are reported through the key-value store and end the worker normally: Ray Train
would restart it after an exception.
"""

import dataclasses
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray.train
from ray.train.collective import broadcast_from_rank_zero

from sae_dist.config import Stopped, UserError
from sae_dist.config import load as load_config
from sae_dist.service.config import TrainJob
from sae_dist.service.devices import device_of_actor
from sae_dist.service.parent_watch import exit_with_parent
from sae_dist.service.placement import Bundle
from sae_dist.service.rank_session import run_rank
from sae_dist.storage import Unavailable
from sae_dist.train.parallel.heartbeat import START_S
from sae_dist.train.parallel.mesh_session import mesh_session
from sae_dist.train.parallel.rendezvous import Rendezvous, connect_store

LOOK_S = 0.5


class Outcome(NamedTuple):
    """The end of a training, as a worker reports it."""

    kind: str  # trained, stopped, unavailable, refused
    told: Any  # the fields of Trained, or a line


def train_worker(given: dict[str, Any]) -> None:
    """Trains as one rank, or returns at once if the mesh has no place for this worker."""
    exit_with_parent()
    job, context = load_config(TrainJob, given["job"]), ray.train.get_context()
    rank, bundle, place = context.get_world_rank(), Bundle(*given["bundle"]), Rendezvous(*given["run"])
    attempt = broadcast_from_rank_zero(secrets.token_hex(4))
    mesh = job.mesh.of_workers(context.get_world_size())
    world = mesh.data * mesh.feature
    if rank >= world:
        return
    run = connect_store(place, START_S)
    try:
        device = device_of_actor(bundle)
        if rank == 0:
            run.set("attempt", json.dumps([attempt, mesh.data]))
        with (
            mesh_session(mesh, place._replace(attempt=attempt), rank=rank, world=world, device=device) as here,
            _stop_requested(place) as stop,
        ):
            trained = run_rank(dataclasses.replace(job, mesh=mesh), here, provenance=given["provenance"], stop=stop)
        outcome = Outcome("trained", trained)
    except Stopped as stopped:
        outcome = Outcome("stopped", str(stopped))
    except Unavailable as error:
        outcome = Outcome("unavailable", str(error))
    except UserError as error:
        outcome = Outcome("refused", str(error))
    if rank == 0 or outcome.kind in ("unavailable", "refused"):  # may be one rank's alone
        run.set("outcome", json.dumps(outcome))


@contextmanager
def _stop_requested(place: Rendezvous) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether the driver asked to stop; a thread polls, so that no step waits for it."""
    store, heard, end = connect_store(place, START_S), threading.Event(), threading.Event()

    def look() -> None:
        while not end.wait(LOOK_S):
            try:
                if store.check(["stop"]):
                    heard.set()
            except RuntimeError:  # the driver is gone, and this worker goes with it
                return

    thread = threading.Thread(target=look, name="asked", daemon=True)
    thread.start()
    try:
        yield heard.is_set
    finally:
        end.set()
        thread.join(timeout=2 * LOOK_S)
