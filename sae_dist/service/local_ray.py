"""Ray's own processes for one run: on the loopback, behind a token, out of reach of signals that ask to stop.

What this needs in the environment is there only while Ray starts: Ray's processes inherit it, other processes do not.
"""

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants, services  # none of what is used of these has a public name
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # see `keep_loopback_address`
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's own 15 would let anything else on the machine stall the run
}
SHIELDED_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # Ray blocks SIGINT itself


def start(cpus: int, **quiet: Any) -> None:
    """A Ray with `cpus` places that only this process and those that Ray starts can talk to; ends with `ray.shutdown`.

    The token is in no file. A message that reaches Ray's ports without it is refused.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with environment(ENVIRONMENT | token), keep_loopback_address(), _shielded():
        read_token()
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1",
            object_store_memory=256 * 2**20, **quiet,
        )  # fmt: skip


def read_token() -> None:
    """Ray reads its mode and token once a process; this process may have used another Ray before."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def keep_loopback_address() -> Iterator[None]:
    """Lets Ray take the address 127.0.0.1 as it is; it would put the address of a network card in its place.

    Ray does this for Windows and macOS, by a variable that it reads when it is imported.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _shielded() -> Iterator[None]:
    before, services.ConsolePopen = services.ConsolePopen, _ShieldedProcess
    try:
        yield
    finally:
        services.ConsolePopen = before


class _ShieldedProcess(subprocess.Popen[bytes]):
    """A process of Ray, the first of a process group, that ignores requests to stop, as all do that it starts.

    A terminal, `timeout`, systemd and Slurm signal all processes of a command at once. The driver alone is to hear it:
    the training saves its state before Ray ends.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)
        try:
            super().__init__(*arguments, process_group=0, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """Ends the whole group, as for the node with its actors."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
