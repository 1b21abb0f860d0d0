"""Machines that are network namespaces on a switch of their own: each has its own card, loopback and /tmp/ray.

A cable can be pulled out of one and put back. The machine's own network gets one interface towards the switch, which
goes when the switch does. The addresses are of TEST-NET-2 (RFC 5737), which nobody has, so that one switch is up at a
time: tests that run side by side wait for each other.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from sae_dist.locks import file_lock

HERE = "198.51.100.254"  # this process, and what it starts outside of the machines
FREE_S = 30.0  # that a killed process may take to be gone


class Machine(NamedTuple):
    """A namespace, its address, and the port of the switch that its cable is in."""

    name: str
    address: str
    port: str


def why_not() -> str | None:
    """What keeps namespaces from being made here, None when nothing does."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    probe = f"sdprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    try:
        _ip("-n", probe, "link", "add", "br0", "type", "bridge")
        _ip("-n", probe, "link", "add", "end0", "type", "veth", "peer", "name", "end1")
        _run(["ip", "netns", "exec", probe, "mount", "--bind", "/tmp", "/tmp"])
    except subprocess.CalledProcessError as refused:
        return f"`{' '.join(refused.cmd)}` fails: {refused.stderr.strip()}"
    finally:
        _ip("netns", "del", probe)
    return None


class Network:
    """A switch and the machines on it. `close` ends all that runs there and leaves nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._tag = folder, f"sd{os.getpid()}"
        self._switch, self.machines = f"{self._tag}sw", list[Machine]()
        self._started: list[subprocess.Popen[str]] = []
        with ExitStack() as taken:
            taken.enter_context(file_lock(Path(tempfile.gettempdir()) / "sae-dist-tests-network.lock"))
            self._begin()
            self._taken = taken.pop_all()

    def _begin(self) -> None:
        Path("/tmp/ray").mkdir(exist_ok=True)
        _clear_dead()
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        _ip("link", "add", self._tag, "type", "veth", "peer", "name", "here", "netns", self._switch)
        _ip("-n", self._switch, "link", "set", "here", "master", "br0", "up")
        _ip("addr", "add", f"{HERE}/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")

    def add(self) -> Machine:
        """One more machine, with its cable in."""
        number = len(self.machines) + 1
        machine = Machine(f"{self._tag}m{number}", f"198.51.100.{number}", f"port{number}")
        _ip("netns", "add", machine.name)
        self.machines.append(machine)
        own, switch = ("-n", machine.name), ("-n", self._switch)
        cable = ("type", "veth", "peer", "name", machine.port, "netns", self._switch)
        _ip("link", "add", "eth0", "netns", machine.name, *cable)
        _ip(*switch, "link", "set", machine.port, "master", "br0", "up")
        _ip(*own, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        _ip(*own, "link", "set", "eth0", "up")
        _ip(*own, "link", "set", "lo", "up")
        (self._folder / machine.name).mkdir()
        return machine

    def start(self, machine: Machine, command: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen[str]:
        """Starts a command on the machine; what it says goes to `log`."""
        inside = ["sh", "-c", f'mount --bind {self._folder / machine.name} /tmp/ray && exec "$@"', "sh", *command]
        with log.open("a") as said:
            process = subprocess.Popen(
                ["ip", "netns", "exec", machine.name, *inside], env=env, stdout=said, stderr=said, text=True,
                start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def pull(self, machine: Machine) -> None:
        """The cable out of the switch: nothing comes to the machine or from it; what is inside it goes on."""
        _ip("-n", self._switch, "link", "set", machine.port, "down")

    def plug(self, machine: Machine) -> None:
        _ip("-n", self._switch, "link", "set", machine.port, "up")

    def processes(self, machine: Machine, named: str = "") -> list[psutil.Process]:
        """What runs on the machine, of those whose name has `named` in it."""
        return _processes(machine.name, named)

    def close(self) -> None:
        for machine in self.machines:
            _end(machine.name)
        for process in self._started:
            process.wait()
        _ip("link", "del", self._tag)
        _ip("netns", "del", self._switch)
        self._taken.close()


def _processes(namespace: str, named: str = "") -> list[psutil.Process]:
    found = []
    for pid in _ip("netns", "pids", namespace).split():
        try:
            process = psutil.Process(int(pid))
            if named in process.name():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _end(namespace: str) -> None:
    """Ends what runs in a namespace, and removes it."""
    until = time.monotonic() + FREE_S
    while (alive := _processes(namespace)) and time.monotonic() < until:
        for process in alive:
            with suppress(psutil.NoSuchProcess):  # another one's end was its own
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(alive, timeout=1)
    _ip("netns", "del", namespace)


def _clear_dead() -> None:
    """Removes what a test run that was killed has left: a second switch with our address would get our packets."""
    for line in _ip("netns", "list").splitlines():
        name, *_ = line.split()
        if (made := re.fullmatch(r"sd(\d+)(?:sw|m\d+)", name)) and not psutil.pid_exists(int(made[1])):
            _end(name)


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
