"""Jobs on a Ray cluster of a head and two worker nodes, which are killed: the run ends in the same dictionary."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sae_dist.service.local_ray import ENVIRONMENT
from sae_dist.service.run_folder import read_status
from tests.service.main_job import DEADLINE_S, files, has_checkpoint, units
from tests.service.submissions import submit
from tests.service.test_harvest_cluster import wait_until

pytestmark = pytest.mark.slow
UNIT_S = 1.0  # that every unit takes longer, so that there is time for harm
BIN = Path(sys.executable).parent


class Cluster:
    """Ray as `ray start` makes it, behind a token: each node is a command with its processes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.token = folder, secrets.token_hex(32)
        slow = {"point": "harvester.before_forward", "action": "sleep", "seconds": UNIT_S, "nth": 0}
        self.env = os.environ | ENVIRONMENT | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "SAE_DIST_FAULTS": json.dumps([slow]),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }  # fmt: skip
        self._port, self._dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self._dashboard}"
        self.started: list[psutil.Popen] = []

    def begin(self) -> None:
        """A head with room for the driver alone, and two nodes; the head is the first of `nodes`."""
        head = ("--head", f"--port={self._port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard}")
        self.nodes = [self._node(0, *head)]
        self.nodes += [self._node(3, f"--address=127.0.0.1:{self._port}") for _ in range(2)]

    def kill(self, node: psutil.Popen) -> None:
        """As when the machine loses its power."""
        family = [node, *node.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)

    def close(self) -> None:
        for node in self.started:
            if node.is_running():
                self.kill(node)

    def _node(self, cpus: int, *more: str) -> psutil.Popen:
        log = self._folder / f"node{len(self.started)}.log"
        command = [
            str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--num-gpus=0",
            f"--object-store-memory={80 << 20}", "--disable-usage-stats", *more,
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


def test_a_job_outlives_its_terminal_a_stop_a_node_and_the_head(cluster: Cluster, uninterrupted: Path, tmp_path: Path):
    out, where = tmp_path / "run", f"address={cluster.address}"
    words = ("run", "preset=tiny", f"out={out}", "wandb.mode=disabled", "scheduler=ray", where)

    first = submit(*words, env=cluster.env)
    assert first.returncode == 0, first.stderr
    (name,) = re.findall(r"submitted (run-run-[0-9a-f]{8}) to", first.stdout)
    assert f"{name} is there already" in submit(*words, env=cluster.env).stdout
    other = submit(*words, "seed=5", env=cluster.env)
    assert other.returncode == 2 and f"is being worked on by {name}" in other.stderr
    stranger = submit(where, command="jobs", env=cluster.env | {"RAY_AUTH_TOKEN": "another"})
    assert stranger.returncode == 2 and "asks for a token" in stranger.stderr

    follower = start("jobs", where, f"follow={name}", env=cluster.env)
    assert "try 1 of 10" in read_until(follower, "try 1 of 10")
    follower.send_signal(signal.SIGINT)
    said, _ = follower.communicate(timeout=DEADLINE_S)
    assert follower.returncode == 75 and f"jobs follow={name} {where}" in said, said

    wait_until(lambda: units(out) >= 2, "nothing was harvested")
    assert re.search(rf"{name} +│ running", submit(where, command="jobs", env=cluster.env).stdout)
    stopped = submit(where, f"stop={name}", command="jobs", env=cluster.env)
    assert stopped.returncode == 0 and f"{name}: stopped" in stopped.stdout, stopped.stderr
    assert (status := read_status(out)) is not None and status["state"] == "stopped"

    again = start("submit", *words, "follow=true", env=cluster.env)
    assert f"submitted {name}-2 to" in read_until(again, "submitted")
    before = units(out)
    wait_until(lambda: units(out) >= before + 2, "it does not go on")
    commands = [" ".join(each.cmdline()) for node in cluster.nodes for each in node.children(recursive=True)]
    assert any("sae_dist run" in line for line in commands) and not any(cluster.token in line for line in commands)
    cluster.kill(cluster.nodes[1])
    before = units(out)
    wait_until(lambda: has_checkpoint(out) and units(out) >= before + 2, "it does not survive a node")

    cluster.kill(cluster.nodes[0])
    assert not (out / "summary.json").exists()
    cluster.begin()
    said, _ = again.communicate(timeout=2 * DEADLINE_S)
    assert again.returncode == 0, said
    assert "waiting for the cluster" in said and f"submitted {name} to" in said  # of which the new one had never heard
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")
    done = submit(*words, env=cluster.env)
    assert done.returncode == 0 and f"{name} is done already, with exit code 0" in done.stdout
    assert not any(cluster.token in path.read_text(errors="replace") for path in out.glob("*.*"))


def start(*words: str, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "sae_dist", *words], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """What it says, up to the line that has the word."""
    said, until = "", time.monotonic() + DEADLINE_S
    assert process.stdout is not None
    while word not in said:
        line = process.stdout.readline()
        assert line and time.monotonic() < until, said
        said += line
    return said
