"""Ray, started here for one run or joined where it was told; never a neighbour's that happens to be found."""

import logging
import os
import re
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
from ray._private.state import available_resources_per_node  # noqa: E402  (a developer API that has no public name)
from ray.exceptions import AuthenticationError, RayActorError, RayTaskError  # noqa: E402

from sae_dist.config import Stopped, UserError  # noqa: E402
from sae_dist.service.room import Bundle, Node, explain, never_fits  # noqa: E402
from sae_dist.service.stopping import StopRequest, listening  # noqa: E402

logger = logging.getLogger(__name__)
QUIET = {"log_to_driver": True, "logging_level": logging.WARNING, "configure_logging": False}
STARTS = 3  # Ray gives its own processes 30 s to start, and a busy machine may need longer


@contextmanager
def cluster(address: str, *, cpus: int) -> Iterator[StopRequest]:
    """Ray for as long as the context lasts: `local` starts one on this machine's loopback with `cpus` places.

    Meanwhile requests to stop do not interrupt: look for them in what the context gives.
    """
    try:
        if address == "local":
            _start_here(cpus)
        else:
            ray.init(address=address, **QUIET)
    except SystemExit:  # Ray's own answer to SIGTERM while it starts
        raise Stopped("SIGTERM") from None
    except (ConnectionError, ValueError, RuntimeError, AuthenticationError) as error:
        if address == "local":
            raise
        raise UserError(
            f"cluster={address} cannot be joined ({first_line(error)}); check the address and, if the cluster asks for "
            "a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or use cluster=local"
        ) from None
    try:
        with listening() as request:  # only now: Ray has put its own handlers there
            yield request
    finally:
        ray.shutdown()


def _start_here(cpus: int) -> None:
    """Ray on this machine's loopback, tried again when the machine was too busy for the time that Ray allows."""
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1",
                object_store_memory=256 * 2**20, **QUIET,
            )  # fmt: skip
            return
        except Exception as error:  # Ray raises nothing narrower
            if "timed out during startup" not in str(error) or attempt == STARTS:
                raise
            logger.warning("Ray's processes did not start within its 30 s (a busy machine?); trying again")
            ray.shutdown()


def nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    free = available_resources_per_node()
    return [
        Node(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_room(bundle: Bundle, processes: int, *, others: int = 0, cure: str) -> None:
    """UserError when the cluster has not what the run asks for, even empty: its actors would wait for ever.

    `others`: processes of one CPU beside those.
    """
    there = nodes()
    cpus = sum(node.total.get("CPU", 0) for node in there)
    if never_fits(bundle, processes, there) or cpus < processes * bundle.cpus + others:
        more = f", and {others} CPU more" if others else ""
        raise UserError(
            f"the run needs {explain(bundle, processes, there)}{more}; {cure}, or give cluster= a larger one"
        )


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def reason_of(death: RayActorError) -> str:
    """Why an actor is gone, as far as Ray knows, in one line: out of memory, its node lost, killed."""
    told = [line.strip() for line in str(death).splitlines() if line.strip()]
    return next((line for line in told if "cause" in line.lower() or "reason" in line.lower()), " ".join(told[:2]))[
        :300
    ]


def answer(ref: ray.ObjectRef) -> Any:
    """`ray.get`, with a user's mistake that was found in an actor raised as what it is."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayActorError as death:
        if death.actor_init_failed:  # trying again would end the same way
            mistake = re.search(r"UserError[^:]*: (.+)", str(death))
            if mistake:
                raise UserError(mistake.group(1)) from None
            raise RuntimeError(f"an actor could not start: {str(death).strip()}") from death
        raise
