"""Jobs on a Ray cluster of a head and two worker nodes, which are killed: the run ends in the same dictionary."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sae_dist.service import local_ray
from sae_dist.service.run_folder import read_status
from tests.service.main_job import DEADLINE_S, files, has_checkpoint, units
from tests.service.submissions import said
from tests.service.test_harvest_cluster import wait_until

pytestmark = pytest.mark.slow
UNIT_S = 2.0  # that every unit takes longer, so that there is time for harm
BIN = Path(sys.executable).parent


class Cluster:
    """Ray as `ray start` makes it, behind a token: each node is a command with its processes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.token = folder, secrets.token_hex(32)
        slow = {"point": "harvester.before_forward", "action": "sleep", "seconds": UNIT_S, "nth": 0}
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "SAE_DIST_FAULTS": json.dumps([slow]),
            "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_worker_niceness": "0",
        }  # fmt: skip
        self._dashboard = free_port()
        self.address = f"http://127.0.0.1:{self._dashboard}"
        self.started: list[psutil.Popen] = []
        self.commands: list[subprocess.Popen[str]] = []

    def begin(self) -> None:
        """A head with room for the driver alone, and two nodes; the head is the first of `nodes`.

        Each has an address of its own on the loopback; Ray would take 127.0.0.1 for that of a network card. The port of
        a head that was killed is taken for Ray while a node of its cluster still looks for it.
        """
        port = free_port()
        head = ("--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard}")
        self.nodes = [self._node("127.0.0.2", 0, *head)]
        self.nodes += [self._node(f"127.0.0.{n}", 3, f"--address=127.0.0.2:{port}") for n in (3, 4)]

    def kill(self, node: psutil.Popen) -> None:
        """As when the machine loses its power."""
        family = [node, *node.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)

    def command(self, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Starts one of our commands; `close` ends it where a test has not."""
        self.commands.append(
            subprocess.Popen(
                [sys.executable, "-u", "-m", "sae_dist", *words], env=env or self.env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
        )  # fmt: skip
        return self.commands[-1]

    def close(self) -> None:
        for command in self.commands:
            command.kill()
            command.communicate()
        for node in self.started:
            if node.is_running():
                self.kill(node)

    def _node(self, address: str, cpus: int, *more: str) -> psutil.Popen:
        log = self._folder / f"node{len(self.started)}.log"
        command = [
            str(BIN / "ray"), "start", "--block", f"--node-ip-address={address}", f"--num-cpus={cpus}", "--num-gpus=0",
            f"--object-store-memory={80 << 20}", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={free_port()}", *more,  # another Ray of this machine has the usual one
        ]  # fmt: skip
        with log.open("w") as said:
            node = psutil.Popen(command, env=self.env, stdout=said, stderr=said, start_new_session=True)
        self.started.append(node)
        wait_until(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None, "no Ray")
        assert node.poll() is None, log.read_text()
        return node


def free_port() -> int:
    """Below Ray's own range for workers."""
    while True:
        port = 5000 + secrets.randbelow(5000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        cluster.begin()
        yield cluster
    finally:
        cluster.close()


def test_a_job_outlives_its_terminal_a_stop_a_node_and_the_head(
    cluster: Cluster, uninterrupted: Path, tmp_path: Path, capsys, monkeypatch
):
    out, where = tmp_path / "run", f"address={cluster.address}"
    words = ("run", "preset=tiny", f"out={out}", "wandb.mode=disabled", "scheduler=ray", where)
    stranger = cluster.command("jobs", where, env=cluster.env | {"RAY_AUTH_TOKEN": "another"})
    complaint, _ = stranger.communicate(timeout=DEADLINE_S)
    assert stranger.returncode == 2 and "asks for a token" in complaint
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    local_ray.read_token()

    (name,) = re.findall(r"submitted (run-run-[0-9a-f]{8}) to", said(capsys, "submit", *words))
    assert f"{name} is there already" in said(capsys, "submit", *words)
    assert f"is being worked on by {name}" in said(capsys, "submit", *words, "seed=5", code=2)
    assert re.search(rf"{name} +│ (pending|running)", said(capsys, "jobs", where))
    wait_until(lambda: units(out) >= 1, "nothing was harvested")
    threading.Timer(5.0, os.kill, (os.getpid(), signal.SIGINT)).start()  # Ctrl-C
    seen = said(capsys, "jobs", where, f"follow={name}", code=75)
    assert (
        "try 1 of 10" in seen and f"the job goes on; follow it again with: sae-dist jobs follow={name} {where}" in seen
    )
    before = units(out)
    wait_until(lambda: units(out) > before, "it does not go on by itself")
    assert f"{name}: stopped" in said(capsys, "jobs", where, f"stop={name}")
    assert (status := read_status(out)) is not None and status["state"] == "stopped"

    again = cluster.command("submit", *words, "follow=true")
    assert f"submitted {name}-2 to" in read_until(again, "submitted")
    before = units(out)
    wait_until(lambda: units(out) > before, "it does not go on")
    commands = [" ".join(each.cmdline()) for node in cluster.nodes for each in node.children(recursive=True)]
    assert any("sae_dist run" in line for line in commands) and not any(cluster.token in line for line in commands)
    cluster.kill(cluster.nodes[1])
    before = units(out)
    wait_until(lambda: has_checkpoint(out) and units(out) > before, "it does not survive a node")

    cluster.kill(cluster.nodes[0])
    assert not (out / "summary.json").exists()
    cluster.begin()
    seen, _ = again.communicate(timeout=2 * DEADLINE_S)
    assert again.returncode == 0, seen
    assert "waiting for the cluster" in seen and f"submitted {name} to" in seen  # of which the new one had never heard
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")
    assert f"{name} is done already, with exit code 0" in said(capsys, "submit", *words)
    assert not any(cluster.token in path.read_text(errors="replace") for path in out.glob("*.*") if path.is_file())


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """What it says, up to the line that has the word."""
    said, until = "", time.monotonic() + DEADLINE_S
    assert process.stdout is not None
    while word not in said:
        line = process.stdout.readline()
        assert line and time.monotonic() < until, said
        said += line
    return said
