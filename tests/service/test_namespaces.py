"""Machines with a network of their own: the processes of a replica meet over it, and a cable is pulled out.

That is a split network as it is in life: what was cut off does not know it and goes on, so that two producers work on
one unit. Nothing is simulated but the distance.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.service import namespaces, stores
from tests.service.namespaces import HERE, Machine, Network
from tests.service.test_harvest_cluster import HEALTH, UNIT_S, committed, finish, status, wait_until
from tests.shards import seaweedfs

WHY_NOT = namespaces.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
LEASE_S = 8
HELD_S = 20.0  # that the machine which is cut off keeps a unit that it has harvested, before it commits it
FLAP_S = 1.0  # a cable that was out for less than anybody's patience


class Cluster:
    """Ray on machines: a head without room, one machine with two places, two with one each."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self._folder = network, folder
        self._env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.hold = folder / "hold"  # taken away: the next unit that the big machine has harvested is held for HELD_S
        self.hold.touch()
        held: dict[str, object] = {"point": "writer.before_commit", "action": "sleep", "seconds": HELD_S, "nth": 0,
                                   "once": str(self.hold)}  # fmt: skip
        self.head = network.add()
        self.address = f"{self.head.address}:6379"
        self._ray(
            self.head, 0, "--head", "--port=6379", "--include-dashboard=false", f"--system-config={json.dumps(HEALTH)}"
        )
        self.big, *self.small = self.add(2, held), self.add(1), self.add(1)

    def add(self, cpus: int, *faults: dict[str, object]) -> Machine:
        machine = self.network.add()
        self._ray(machine, cpus, f"--address={self.address}", faults=faults)
        return machine

    def drive(self, command: Sequence[str], log: Path) -> subprocess.Popen[str]:
        """Starts our command on the head."""
        return self.network.start(self.head, [sys.executable, "-m", "sae_dist", *command], self._env, log)

    def replicas(self, machine: Machine) -> list[psutil.Process]:
        return self.network.processes(machine, "Replica")

    def _ray(self, machine: Machine, cpus: int, *more: str, faults: Sequence[dict[str, object]] = ()) -> None:
        slow = {"point": "harvester.before_forward", "action": "sleep", "seconds": UNIT_S, "nth": 0}
        env = self._env | {"SAE_DIST_FAULTS": json.dumps([slow, *faults]), "RAY_worker_niceness": "0"}
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={machine.address}",
            f"--num-cpus={cpus}", f"--object-store-memory={80 << 20}", "--disable-usage-stats", *more,
        ]  # fmt: skip
        log = self._folder / f"{machine.name}.log"
        process = self.network.start(machine, command, env, log)
        wait_until(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, f"{machine}: no Ray")
        assert process.poll() is None, log.read_text()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: the path of a Unix socket has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="sd-", ignore_cleanup_errors=True) as place:
        yield Path(place)


@pytest.fixture
def network(folder: Path) -> Iterator[Network]:
    network = Network(folder)
    yield network
    network.close()


@pytest.fixture(params=["folder", "s3"])
def place(request, network: Network, folder: Path, monkeypatch) -> Iterator[str]:
    """Where the store goes: a folder that all machines share whatever their cables do, or S3 over the same network."""
    if request.param == "folder":
        yield str(folder / "store")
        return
    with seaweedfs.server(folder / "seaweedfs", HERE) as endpoint:
        seaweedfs.make_bucket(endpoint)
        for name, value in {**seaweedfs.KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/store"


def test_a_pulled_cable_makes_two_producers_of_a_unit_of_which_one_counts(
    place: str, network: Network, folder: Path, tmp_path: Path
):
    """P4. A replica is cut off whole, and another one through its middle; both come back after they were replaced."""
    model = stores.predictable_model(tmp_path / "model")
    out, log, tokens = tmp_path / "out", tmp_path / "log", 256 * 200
    cluster = Cluster(network, folder)
    two = ("harvest.tensor_parallel=2", "harvest.replicas=2", f"harvest.lease_s={LEASE_S}")
    driver = cluster.drive(stores.overrides(model, place, out, *two, f"cluster={cluster.address}", tokens=tokens), log)
    took: dict[str, float] = {}

    def whole(deaths: int) -> bool:
        found = status(out)
        return found.get("deaths", 0) == deaths and found.get("replicas") == 2

    took["start"] = wait_until(lambda: whole(0), "two replicas never came", driver)
    assert [len(cluster.replicas(machine)) for machine in (cluster.big, *cluster.small)] == [2, 1, 1]
    wait_until(lambda: committed(place) >= 4, "nothing was committed", driver)

    network.pull(cluster.big)
    time.sleep(FLAP_S)
    network.plug(cluster.big)
    before = committed(place)
    wait_until(lambda: committed(place) >= before + 8, "nothing goes on after a short cut", driver)
    assert whole(0)

    cluster.hold.unlink()
    wait_until(cluster.hold.exists, "nobody came to commit", driver)
    cut_off = cluster.replicas(cluster.big)
    network.pull(cluster.big)
    pulled = time.monotonic()
    took["second producer"] = wait_until(lambda: most_attempts(place) == 2, "the unit has one producer", driver)
    cluster.add(2)
    took["cut off"] = wait_until(lambda: whole(1), "no replica came after the cut", driver)
    wait_until(lambda: time.monotonic() > pulled + HELD_S + 3, "", driver)
    assert all(process.is_running() for process in cut_off)
    if "://" not in place:
        assert most_attempts(place) == 1  # it came late, lost, and took away its copy
    network.plug(cluster.big)
    took["ended after its return"] = wait_until(lambda: not cluster.replicas(cluster.big), "left behind", driver)

    network.pull(cluster.small[1])
    cluster.add(1)
    took["cut through"] = wait_until(lambda: whole(2), "no replica came after the second cut", driver)
    network.plug(cluster.small[1])
    wait_until(lambda: not cluster.replicas(cluster.small[1]), "left behind", driver)

    finish(driver, log)
    print(json.dumps({"seconds": {k: round(v, 1) for k, v in took.items()}}))
    stores.check_every_row(stores.opened(place), model, out, tokens=tokens)
    wait_until(lambda: not any(map(cluster.replicas, network.machines)), "left behind")


def most_attempts(store: str) -> int:
    """How many producers' data lie in the store of the unit that has most."""
    found: dict[str, set[str]] = defaultdict(set)
    for entry in stores.opened(store).storage.list("data/"):
        _, unit, attempt = entry.key.rsplit("/", 2)
        found[unit].add(attempt)
    return max(map(len, found.values()), default=0)
