"""Ray's processes for one run: on the loopback only, protected by a token, shielded from signals that ask to stop.

The environment is changed only while Ray starts: Ray's processes inherit the change, others do not.
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
    """Starts a Ray with `cpus` CPUs that only this process and Ray's own can talk to; `ray.shutdown` ends it.

    The token is in no file. Ray refuses messages without it. No process is left where starting fails.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with environment(ENVIRONMENT | token), keep_loopback_address(), _shielded():
        read_token()
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1",
            object_store_memory=256 * 2**20, **quiet,
        )  # fmt: skip


def read_token() -> None:
    """Makes Ray read its mode and token again: it reads them once, and this process may have used another Ray."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for as long as the context lasts."""
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
    """Makes Ray keep the address 127.0.0.1, which it would replace by the address of a network card.

    Ray does so on Windows and macOS, by a variable that it reads when it is imported.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _shielded() -> Iterator[None]:
    """Shields the processes that Ray starts meanwhile; ends them where that fails, as Ray itself would not."""
    started = list[_ShieldedProcess]()

    def start(*arguments: Any, **options: Any) -> _ShieldedProcess:
        started.append(_ShieldedProcess(*arguments, **options))
        return started[-1]

    before, services.ConsolePopen = services.ConsolePopen, start  # type: ignore[assignment]
    try:
        yield
    except BaseException:
        for process in started:
            process.terminate()
            process.wait()
        raise
    finally:
        services.ConsolePopen = before


class _ShieldedProcess(subprocess.Popen[bytes]):
    """A process of Ray in a process group of its own; it and its children ignore signals that ask to stop.

    A terminal, `timeout`, systemd and Slurm signal all processes of a command at once. Only the driver reacts, so that
    training saves its state before Ray ends.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)
        try:
            super().__init__(*arguments, process_group=0, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """Kills the whole group: the node with its actors."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
