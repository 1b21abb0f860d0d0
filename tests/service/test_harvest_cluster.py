"""Several nodes on one machine: two replicas of two processes each, to a folder and to S3, while everything fails.

The letters are those of the faults that are promised to be harmless: P1 a producer is killed, P2 it hangs, P3 a node is
lost, P4 the network splits, P7 the driver or the head is killed, P8 a run is started twice, M1 a slow reader, M2 a
process over its memory, N1 a model that emits NaN, Inf and huge rows, T1 a slow process. Afterwards every unit is there
once and every row is looked at.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sae_dist.shards import consumers
from sae_dist.shards.consumers import ConsumerPosition
from sae_dist.shards.reader import Store
from sae_dist.storage import StorageError
from tests.service import stores
from tests.service.clusters import LoopbackCluster
from tests.shards import seaweedfs

pytestmark = pytest.mark.slow
UNIT_S = 1.0  # that every unit takes longer in the model, so that there is time for harm
DEADLINE_S = 1200  # for one thing to happen, on a machine that has much else to do
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 1000,
          "health_check_failure_threshold": 5}  # fmt: skip
HARM = {  # each happens once, when its file is taken away
    "writer.before_data": "kill",
    "writer.before_commit": "kill",
    "writer.after_commit": "kill",
    "harvester.before_forward": "stop",
}
TWO = ("harvest.tensor_parallel=2", "harvest.replicas=2", "harvest.lease_s=10")


class Nodes:
    """A cluster of a head without room and two nodes with room for a replica each."""

    def __init__(self, harm: Path) -> None:
        harm.mkdir(exist_ok=True)
        self._harm = harm
        rules: list[dict[str, Any]] = [
            {"point": "harvester.before_forward", "action": "sleep", "seconds": UNIT_S, "nth": 0}
        ]
        for point, action in HARM.items():
            (harm / point).touch()
            rules.append({"point": point, "action": action, "nth": 0, "once": str(harm / point)})
        os.environ["SAE_DIST_FAULTS"] = json.dumps(rules)
        head = {"num_cpus": 0, "_system_config": HEALTH, "include_dashboard": False, "object_store_memory": 80 << 20}
        self.cluster = LoopbackCluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add(), self.add()]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=2, object_store_memory=80 << 20)

    def do_harm(self, point: str) -> None:
        """The next process that comes to `point` is harmed; returns when it has been."""
        (self._harm / point).unlink()
        wait_until((self._harm / point).exists, f"nobody came to {point}")

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def replicas(self) -> list[psutil.Process]:
        """Processes of replicas on nodes whose raylet is alive."""
        raylets = [self.raylet(node) for node in self.workers]
        return [child for raylet in raylets for child in raylet.children() if "Replica" in child.name()]

    def close(self) -> None:
        self.cluster.shutdown()
        os.environ.pop("SAE_DIST_FAULTS", None)


@pytest.fixture
def nodes(tmp_path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path / "harm")
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return stores.predictable_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path, monkeypatch) -> Iterator[str]:
    """Where the store goes: a folder, or a real S3 server."""
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    with seaweedfs.server(tmp_path / "seaweedfs") as endpoint:
        seaweedfs.make_bucket(endpoint)
        for name, value in {**seaweedfs.KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/store"


def wait_until(true: Callable[[], Any], otherwise: str, driver: subprocess.Popen[str] | None = None) -> float:
    """Seconds until it was true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + DEADLINE_S, otherwise
        assert driver is None or driver.poll() is None, f"the driver has ended: {otherwise}"
        time.sleep(0.1)
    return time.monotonic() - began


def drive(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, "-m", "sae_dist", *arguments], stderr=file, stdout=file, text=True)


def finish(driver: subprocess.Popen[str], log: Path) -> str:
    code = driver.wait(timeout=2 * DEADLINE_S)
    assert code == 0, log.read_text()[-5000:]
    return log.read_text()


def status(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / "status.json").read_text()).get("harvest", {})
    except FileNotFoundError:
        return {}


def committed(store: str) -> int:
    try:
        return len(stores.opened(store).committed())
    except (FileNotFoundError, StorageError, ValueError):  # not made yet
        return 0


def test_killed_hung_lost_split_and_slow_replicas_lose_no_row(place: str, nodes: Nodes, model: Path, tmp_path: Path):
    """P1 at three places, P2, T1, P4, P3, one after the other while two replicas of two processes harvest."""
    out, log, tokens = tmp_path / "out", tmp_path / "log", 256 * 240
    command = stores.overrides(model, place, out, *TWO, f"cluster={nodes.cluster.address}", tokens=tokens)
    driver = drive(command, log)
    took: dict[str, float] = {}

    def whole(deaths: int) -> bool:
        found = status(out)
        return found.get("deaths", 0) >= deaths and found.get("replicas") == 2

    try:
        took["start"] = wait_until(lambda: whole(0), "two replicas never came", driver)
        wait_until(lambda: committed(place) >= 4, "nothing was committed", driver)
        for deaths, point in enumerate(HARM, start=1):
            nodes.do_harm(point)
            took[point] = wait_until(lambda deaths=deaths: whole(deaths), f"no replica came after {point}", driver)
        slow = nodes.replicas()[0]
        ending = threading.Event()
        brake = threading.Thread(target=stop_and_go, args=(slow, ending))
        brake.start()
        took["T1 named"] = wait_until(lambda: f"pid {slow.pid} " in status(out).get("alert", ""), "not named", driver)
        ending.set()
        brake.join()
        split = nodes.raylet(nodes.workers[0])
        cut_off = [child for child in split.children() if "Replica" in child.name()]
        split.suspend()  # P4: its replica lives, works and commits; nobody hears of it
        nodes.workers[0] = nodes.add()
        took["P4"] = wait_until(lambda: whole(len(HARM) + 1), "no replica came after the split", driver)
        split.resume()
        lost = nodes.raylet(nodes.workers[1])
        lost.kill()
        nodes.workers[1] = nodes.add()
        took["P3"] = wait_until(lambda: whole(len(HARM) + 2), "no replica came after the node was lost", driver)
        said = finish(driver, log)
    finally:
        driver.kill()
        driver.wait()
    print(json.dumps({"seconds until all replicas were at work": {k: round(v, 1) for k, v in took.items()}}))
    stores.check_every_row(stores.opened(place), model, out, tokens=tokens)
    assert "no sign of life for harvest.lease_s=10" in said
    _, alive = psutil.wait_procs([*cut_off, *nodes.replicas()], timeout=60)
    assert not alive, f"left behind: {alive}"
    assert not list(Path("/tmp/ray").glob("session_latest/logs/*spill*"))  # nothing goes through the object store


def stop_and_go(process: psutil.Process, ending: threading.Event) -> None:
    """Lets a process work for a sixth of the time."""
    while not ending.is_set():
        process.suspend()
        ending.wait(2.5)
        process.resume()
        time.sleep(0.5)


def test_a_killed_driver_a_second_driver_and_a_killed_head(nodes: Nodes, model: Path, tmp_path: Path):
    """P8, P7: the second driver is refused; the same command goes on, on the same cluster and on a new one."""
    units = 400  # far more than are done while commands start and Ray waits for its head
    out, store, log, tokens = tmp_path / "out", str(tmp_path / "store"), tmp_path / "log", 256 * units

    def command(out: Path, at: Nodes) -> list[str]:
        return stores.overrides(model, store, out, *TWO, f"cluster={at.cluster.address}", tokens=tokens)

    driver = drive(command(out, nodes), log)
    wait_until(lambda: committed(store) >= 4, "nothing was committed", driver)
    second = subprocess.run(
        [sys.executable, "-m", "sae_dist", *command(tmp_path / "other", nodes)], capture_output=True, text=True
    )
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert second.returncode == 2 and f"is in use by process {driver.pid}" in line
    assert driver.poll() is None
    driver.kill()
    driver.wait()
    wait_until(lambda: not nodes.replicas(), "replicas outlive their driver")
    before = committed(store)
    driver = drive(command(out, nodes), log)
    again = wait_until(lambda: committed(store) >= before + 4, "it does not go on", driver)
    nodes.cluster.head_node.all_processes["gcs_server"][0].process.kill()
    assert driver.wait(timeout=DEADLINE_S) != 0
    nodes.close()
    before = committed(store)
    assert before < units  # the driver goes on for as long as Ray waits for its head
    other = Nodes(tmp_path / "harm")
    try:
        driver = drive(command(out, other), log)
        anew = wait_until(lambda: committed(store) >= before + 1, "it does not go on", driver)
        finish(driver, log)
        stores.check_every_row(stores.opened(store), model, out, tokens=tokens)
        tokens_of = {commit.attempt.partition("-")[0] for commit in stores.opened(store).committed().values()}
        assert tokens_of == {"000001", "000002", "000003"}  # who held the store, in every commit
    finally:
        other.close()
    print(json.dumps({"seconds to the next units": {"driver killed": round(again, 1), "head killed": round(anew, 1)}}))


def test_a_slow_reader_holds_the_harvest_and_what_it_has_read_goes(model: Path, tmp_path: Path):
    """M1 and retention: never more than 8 units wait, nor more data on disk than that and what is being read."""
    out, place, log, tokens = tmp_path / "out", str(tmp_path / "store"), tmp_path / "log", 256 * 60
    more = ("harvest.ahead_units=8", "harvest.retention=until_consumed", "harvest.replicas=1..2")
    driver = drive(stores.overrides(model, place, out, *more, tokens=tokens), log)
    taken, most, data, memory = 0, 0, 0, []
    try:
        wait_until(lambda: committed(place) >= 1, "nothing was committed", driver)
        store: Store = stores.opened(place)
        while taken < 60:
            consumers.report(store.storage, ConsumerPosition("reader", taken, max(taken - 2, 0)))
            time.sleep(0.25)
            there = len(store.committed())
            most = max(most, there - taken)
            data = max(data, len(list(store.storage.list("data/"))) // len(stores.HOOKS))
            memory.append(sum(p.memory_info().rss for p in replicas_of(driver.pid)))
            taken = min(taken + 1, there)
        consumers.sign_off(store.storage, "reader")
        finish(driver, log)
    finally:
        driver.kill()
        driver.wait()
    figures = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    print(json.dumps({"most units waiting": most, "most on disk": data, "held_s": figures[-1]["held_s"]}))
    assert most <= 8
    assert data <= 8 + 2 + 12  # what waits, what the reader's checkpoint needs, what it read between two looks
    assert figures[-1]["held_s"] > 0
    half = len(memory) // 2
    assert max(memory[half:]) < 1.2 * max(memory[: half or 1]) + (64 << 20)


def replicas_of(driver: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(driver).children(recursive=True) if "Replica" in child.name()]


def test_a_process_over_its_memory_is_replaced(model: Path, tmp_path: Path, monkeypatch):
    """M2: it may take no more memory than it has, from some moment on."""
    rule = {"point": "harvester.before_forward", "action": "sleep", "seconds": UNIT_S, "nth": 0}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([rule]))
    out, place, log = tmp_path / "out", str(tmp_path / "store"), tmp_path / "log"
    driver = drive(stores.overrides(model, place, out, "harvest.lease_s=10"), log)
    try:
        wait_until(lambda: committed(place) >= 3, "nothing was committed", driver)
        (replica,) = replicas_of(driver.pid)
        replica.rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))
        finish(driver, log)
    finally:
        driver.kill()
        driver.wait()
    stores.check_every_row(stores.opened(place), model, out)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["deaths"] >= 1 and last["retried"] >= 1
