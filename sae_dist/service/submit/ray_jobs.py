"""Jobs of a Ray cluster that is there: its own job service starts the command on the head node and keeps its log.

A job's name there is the run's, with a number when it is submitted again. The cluster remembers what became of it for
as long as its head lives; the run itself is remembered by its folder.
"""

import asyncio
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import requests
from aiohttp import ClientError
from pydantic import Field
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from sae_dist.config import Stopped, UserError, frozen
from sae_dist.service.submit.job import Job, environment, left_alone

logger = logging.getLogger(__name__)
logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

RUN, NUMBER, OUT = "sae_dist.run", "sae_dist.number", "sae_dist.out"  # what Ray keeps of a job beside its command
CONNECT_S = 5.0
LOOK_S = 1.0
BEGIN_S = 30.0  # that the head of a cluster may take from its first answer to its first job
LOST_S = 3600.0  # that whoever follows a job waits for a cluster to come back, or another one in its place


class Lost(UserError):
    """The cluster does not answer; it may come back."""


@frozen
class RayJobs:
    """A Ray cluster, by the address of its dashboard."""

    kind: Literal["ray"] = "ray"
    address: str  # of the cluster's dashboard: http://HEAD:8265
    follow: bool = False  # show the job's log until it ends; Ctrl-C leaves the job running
    tries: Annotated[int, Field(ge=1)] = 10  # how often it is started in all: after a preemption, a death, a lost head
    stop_s: Annotated[int, Field(ge=1)] = 600  # seconds that a job that is stopped has to save; then it is killed
    python: str = "python"  # on the cluster's nodes
    env: tuple[str, ...] = ()  # names of variables that go along; secrets belong on the nodes

    def __post_init__(self) -> None:
        check_address(self.address)


class Found(NamedTuple):
    """A job of ours on a cluster."""

    id: str
    run: str
    number: int
    out: str
    info: JobDetails

    @property
    def ended(self) -> bool:
        return self.info.status.is_terminal()

    @property
    def state(self) -> str:
        return self.info.status.value.lower()


def check_address(address: str) -> None:
    """ValueError unless it is that of a dashboard."""
    try:
        parts = urlsplit(address)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        is_dashboard = is_plain and parts.port != 0
    except ValueError:  # a port that is none, half of a bracket
        is_dashboard = False
    if not is_dashboard:
        raise ValueError(f"address={address} is not that of a dashboard: http://HEAD:8265, or https:// behind a proxy")


def request(job: Job, options: RayJobs, number: int = 1) -> dict[str, Any]:
    """What is sent to Ray, by the arguments of its `submit_job`."""
    variables = environment(options.env) | {"RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_s)}
    return {
        "submission_id": job.id if number == 1 else f"{job.id}-{number}",
        "entrypoint": f"exec {shlex.join(job.attempts(options.python, options.tries, cluster='auto'))}",
        "runtime_env": {"env_vars": variables},
        "metadata": {RUN: job.id, NUMBER: str(number), OUT: job.out},
    }


def render(job: Job, options: RayJobs) -> str:
    """The request, for people."""
    return json.dumps({"address": options.address} | request(job, options), indent=2)


def submit(job: Job, options: RayJobs) -> int:
    """Sends the job unless it runs there or has ended well; the exit code of this command."""
    found = _submit(job, options)
    if options.follow:
        return follow(options.address, found, lambda: _submit(job, options), options.tries)
    print(f"follow it with: sae-dist jobs follow={found} address={options.address}")
    return 0


def _submit(job: Job, options: RayJobs) -> str:
    """The name of the job on the cluster, which is a new one if the last of this run has not ended well."""
    with _client(options.address) as client:
        there = jobs_of(client)
        last = max((found for found in there if found.run == job.id), key=lambda found: found.number, default=None)
        if last is not None and not last.ended:
            print(f"{last.id} is there already: {last.state}")
            return last.id
        if last is not None and last.info.status == JobStatus.SUCCEEDED:
            print(f"{last.id} is done already, with exit code 0; its results are in {job.out}")
            return last.id
        for found in there:
            if found.out == job.out and not found.ended:
                raise UserError(
                    f"out={job.out} is being worked on by {found.id}, which has another configuration; wait for it, "
                    f"stop it (sae-dist jobs stop={found.id} address={options.address}), or choose another out="
                )
        sent = request(job, options, number=1 if last is None else last.number + 1)
        try:
            _send(client, sent)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            print(f"{sent['submission_id']} is there already: submitted a moment ago")
        else:
            print(f"submitted {sent['submission_id']} to {options.address}")
        return sent["submission_id"]


def _send(client: JobSubmissionClient, sent: Mapping[str, Any]) -> None:
    """Submits a job. A cluster that has just been started answers before it can take one: it is asked again."""
    until = time.monotonic() + BEGIN_S
    while True:
        try:
            client.submit_job(**sent)
            return
        except RuntimeError as error:
            if "try again later" not in str(error):
                raise
            if time.monotonic() > until:
                raise Lost(
                    "the cluster's head has no agent that runs jobs; its dashboard_agent.log says why. If another Ray "
                    "of that machine has the port, start the head with --dashboard-agent-listen-port="
                ) from None
        time.sleep(LOOK_S)


def jobs_of(client: JobSubmissionClient) -> list[Found]:
    """The jobs of ours that the cluster remembers, the oldest first."""
    found = [
        Found(each.submission_id, kept[RUN], int(kept[NUMBER]), kept[OUT], each)
        for each in client.list_jobs()
        if each.submission_id and RUN in (kept := each.metadata or {})
    ]
    return sorted(found, key=lambda each: each.info.start_time or 0)


def listed(address: str) -> list[Found]:
    with _client(address) as client:
        return jobs_of(client)


def stop(address: str, name: str) -> None:
    """Asks a job to stop, and returns when it has saved and ended."""
    with _client(address) as client:
        if (info := _known(client, address, name)).status.is_terminal():
            print(f"{name} had ended: {info.status.value.lower()}")
            return
        client.stop_job(name)
        print(f"{name} was asked to stop; it saves first")
        while not (info := _known(client, address, name)).status.is_terminal():
            time.sleep(LOOK_S)
        print(f"{name}: {info.status.value.lower()}; submit it again to resume")


def follow(address: str, name: str, again: Callable[[], str] | None = None, tries: int = 1) -> int:
    """Shows a job's log until it ends; the exit code that it stands for.

    A cluster that is gone is waited for. `again` submits the job, up to so many `tries`, to the one that comes in its
    place and has never heard of it.
    """
    with _client(address) as client:
        _known(client, address, name)
    log = Log()
    try:
        while True:
            try:
                with _client(address) as client:
                    if again is not None and tries > 1 and _info(client, name) is None:
                        tries, log, name = tries - 1, Log(), again()
                    asyncio.run(log.show(client, name))
                    if (info := _known(client, address, name)).status.is_terminal():
                        print(f"{name}: {info.status.value.lower()}")
                        return _exit_code(info)
                time.sleep(LOOK_S)
            except Lost as lost:
                logger.warning("%s; waiting for the cluster. Ctrl-C leaves the job alone", lost)
                _wait_for(address)
    except (KeyboardInterrupt, Stopped):
        return left_alone(f"{name} address={address}")


class Log:
    """A job's log, of which each part is shown once however often the connection is lost."""

    def __init__(self) -> None:
        self._shown = 0  # characters

    async def show(self, client: JobSubmissionClient, name: str) -> None:
        """Prints what has not been shown, for as long as the log grows."""
        seen = 0
        async for text in client.tail_job_logs(name):
            seen += len(text)
            if seen > self._shown:
                print(text[len(text) - (seen - self._shown) :], end="", flush=True)
                self._shown = seen


def _exit_code(info: JobDetails) -> int:
    """That of the command: 75 where the job was stopped, 1 where Ray does not know it."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 75
    return info.driver_exit_code or 1


def _known(client: JobSubmissionClient, address: str, name: str) -> JobDetails:
    info = _info(client, name)
    if info is None:
        raise UserError(f"{address} has no job {name}; `sae-dist jobs address={address}` lists them")
    return info


def _info(client: JobSubmissionClient, name: str) -> JobDetails | None:
    return next((each for each in client.list_jobs() if each.submission_id == name), None)


@contextmanager
def _client(address: str) -> Iterator[JobSubmissionClient]:
    """Ray's client of the dashboard at this address, whatever RAY_ADDRESS says; `Lost` where it does not answer."""
    kept = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        _reach(address)
        yield JobSubmissionClient(address, verify=os.environ.get("REQUESTS_CA_BUNDLE", True))
    except AuthenticationError as refused:
        raise UserError(
            f"address={address} asks for a token ({_line(refused)}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or "
            "RAY_AUTH_TOKEN_PATH, to the cluster's"
        ) from None
    except BrokenPipeError:  # of our own output: `| head` has read enough
        raise
    except (requests.RequestException, ClientError, OSError) as error:
        raise Lost(f"address={address}: no Ray dashboard answers there ({_line(error)})") from None
    except RuntimeError as error:  # Ray's client raises nothing narrower
        if not str(error).startswith(("Request failed", "WebSocket")):
            raise
        raise Lost(f"address={address}: the cluster does not do its work ({_line(error)})") from None
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _reach(address: str) -> None:
    """OSError, within seconds, where nothing listens."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), CONNECT_S).close()


def _wait_for(address: str) -> None:
    """Until something answers there; UserError after an hour."""
    until = time.monotonic() + LOST_S
    while time.monotonic() < until:
        time.sleep(5 * LOOK_S)
        with suppress(OSError):
            return _reach(address)
    raise UserError(f"address={address} has not answered for {LOST_S / 60:.0f} minutes; submit again when it is back")


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
