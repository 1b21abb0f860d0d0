"""Connections to Ray: a private one started for this run, or the cluster at the address given."""

import logging
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import available_resources_per_node  # a developer API that has no public name
from ray.exceptions import RayActorError, RayError, RayTaskError

from sae_dist.config import Stopped, UserError
from sae_dist.service import local_ray
from sae_dist.service.placement import Bundle, Node, explain, never_fits
from sae_dist.service.signals import StopRequest, catch_signals
from sae_dist.storage import Unavailable

logger = logging.getLogger(__name__)
QUIET = {"log_to_driver": True, "logging_level": logging.WARNING, "configure_logging": False}
STARTS = 3  # tries: Ray gives its own processes 30 s to start, and a busy machine may need longer
ANSWER_S = 5.0  # seconds that a cluster's head may take to accept a connection


@contextmanager
def cluster(address: str, *, cpus: int) -> Iterator[StopRequest]:
    """Connects to Ray for as long as the context lasts; `local` starts one on this machine's loopback with `cpus` CPUs.

    Inside, SIGTERM and Ctrl-C do not interrupt: check the StopRequest that the context yields. UserError, within
    seconds, when no Ray answers at `address`.
    """
    try:
        if address == "local":
            _start_here(cpus)
        else:
            _join(address)
    except SystemExit:  # Ray's own answer to SIGTERM while it starts
        raise Stopped("SIGTERM") from None
    try:
        with catch_signals() as request:  # only now: Ray has put its own handlers there
            yield request
    finally:
        ray.shutdown()


def _start_here(cpus: int) -> None:
    """Starts Ray on this machine's loopback; retries when its processes were too slow to start."""
    for attempt in range(1, STARTS + 1):
        try:
            local_ray.start(cpus, **QUIET)
            return
        except Exception as error:  # Ray raises nothing narrower
            if "timed out during startup" not in str(error) or attempt == STARTS:
                raise
            logger.warning("Ray's processes did not start within 30 s (a busy machine?); trying again")
            ray.shutdown()


def check_address(address: str) -> None:
    """UserError, within seconds, when no Ray answers at `address`; call it before long work that does not need Ray."""
    if address != "local":
        _head(address)


def _join(address: str) -> None:
    """Joins the cluster whose head is at `address` (HOST:PORT, or `auto` to look for one)."""
    head = _head(address)
    try:
        local_ray.read_token()
        with local_ray.keep_loopback_address():
            ray.init(address=head, **QUIET)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise _no_cluster(address, first_line(error)) from None


def _head(address: str) -> str:
    """The address of the cluster's head, checked within seconds: Ray itself would try for five minutes."""
    try:
        head = services.get_ray_address_from_environment(address, None) if address == "auto" else address
        if head is None or "://" in head:
            raise ValueError(f"{head} is not the HOST:PORT of a head, e.g. 10.0.0.1:6379")
        services.extract_ip_port(head)
    except (OSError, ValueError) as error:
        raise _no_cluster(address, first_line(error)) from None
    channel: grpc.Channel = init_grpc_channel(head, ray_constants.GLOBAL_GRPC_OPTIONS)  # pyright: ignore[reportAssignmentType]
    with closing(channel), suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        return head
    raise _no_cluster(address, f"no Ray answers at {head} within {ANSWER_S:.0f} s")


def _no_cluster(address: str, why: str) -> UserError:
    return UserError(
        f"cluster={address} cannot be joined ({why}); check the address and, if the cluster asks for a token, "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or use cluster=local"
    )


def nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    free = available_resources_per_node()
    return [
        Node(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_capacity(bundle: Bundle, processes: int, *, others: int = 0, cure: str) -> None:
    """UserError when even the empty cluster is too small for `processes` bundles: their actors would wait for ever.

    others: further processes of one CPU each
    """
    there = nodes()
    cpus = sum(node.total.get("CPU", 0) for node in there)
    if never_fits(bundle, processes, there) or cpus < processes * bundle.cpus + others:
        more = f", and {others} CPU more" if others else ""
        raise UserError(
            f"the run needs {explain(bundle, processes, there)}{more}; {cure}, or give cluster= a larger one"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def death_reason(death: RayActorError) -> str:
    """Why an actor died, as far as Ray knows, in one line: out of memory, node lost, killed."""
    told = [line.strip() for line in str(death).splitlines() if line.strip()]
    return next((line for line in told if "cause" in line.lower() or "reason" in line.lower()), " ".join(told[:2]))[
        :300
    ]


def result_of(ref: ray.ObjectRef) -> Any:
    """`ray.get` that raises an actor's UserError as a UserError, and Unavailable as what it is."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            kind = Unavailable if isinstance(error.cause, Unavailable) else UserError
            raise kind(str(error.cause)) from None
        raise
    except RayActorError as death:
        if death.actor_init_failed:  # a retry would fail in the same way
            mistake = re.search(r"UserError[^:]*: (.+)", str(death))
            if mistake:
                raise UserError(mistake.group(1)) from None
            raise RuntimeError(f"an actor could not start: {str(death).strip()}") from death
        raise
