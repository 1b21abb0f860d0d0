"""Ray, started here for one run or joined where it was told; never a neighbour's that happens to be found."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Read when ray is imported. The first one's name is about other systems; its effect is that Ray stays on the address it
# is given, here the loopback, where it would look up this machine's network card.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 would let anything else on the machine stall the run

import ray  # noqa: E402
from ray.exceptions import RayTaskError  # noqa: E402

from sae_dist.config import UserError  # noqa: E402


@contextmanager
def cluster(address: str, *, cpus: int) -> Iterator[None]:
    """Ray for as long as the context lasts: `local` starts one on this machine's loopback with `cpus` places."""
    asked_to_stop = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": True, "logging_level": logging.WARNING, "configure_logging": False}
    if address == "local":
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1",
            object_store_memory=256 * 2**20, **quiet,
        )  # fmt: skip
    else:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cluster={address} cannot be joined ({reason}); check the address, or use cluster=local"
            ) from None
    signal.signal(signal.SIGTERM, asked_to_stop)  # Ray has put its own there, which ends the process on the spot
    try:
        yield
    finally:
        ray.shutdown()


def answer(ref: ray.ObjectRef) -> Any:
    """`ray.get`, with a user's mistake that was found in an actor raised as what it is."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
