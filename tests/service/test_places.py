"""The same command in three places: Ray started for it here, a cluster that is there, replicas spread over its nodes.

Nothing but `cluster=` differs in the arguments, relative paths among them, and nothing in what comes out.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.service import stores
from tests.service.clusters import LoopbackCluster
from tests.service.main_job import files
from tests.service.test_harvest_cluster import finish, status, wait_until

pytestmark = pytest.mark.slow
PLACES = {"here": None, "one node": (5,), "three nodes": (1, 2, 2)}  # CPUs of each; a replica takes two
TWO = ("harvest.tensor_parallel=2", "harvest.replicas=2")
UNIT_S = 0.3  # that every unit takes longer, so that the replicas are seen at work
TOKENS = 256 * 30


@contextmanager
def cluster(cpus: tuple[int, ...] | None) -> Iterator[LoopbackCluster | None]:
    if cpus is None:
        yield None
        return
    head = {"num_cpus": cpus[0], "include_dashboard": False, "object_store_memory": 80 << 20}
    there = LoopbackCluster(initialize_head=True, head_node_args=head)
    try:
        for more in cpus[1:]:
            there.add_node(num_cpus=more, object_store_memory=80 << 20)
        yield there
    finally:
        there.shutdown()


def on_nodes(there: LoopbackCluster) -> list[int]:
    """How many processes of replicas each node has started, the head first."""
    nodes: list[Any] = [there.head_node, *(node for node in there.list_all_nodes() if node is not there.head_node)]
    raylets = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in nodes]
    return [sum("Replica" in child.name() for child in raylet.children()) for raylet in raylets]


def work(arguments: list[str], folder: Path, out: str, there: LoopbackCluster | None) -> list[int]:
    """Runs the command in `folder`; where its replicas were."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "sae_dist", *arguments, f"cluster={'local' if there is None else there.address}"]
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, text=True)
    try:
        wait_until(lambda: status(folder / out).get("replicas") == 2, "two replicas never came", driver)
        found = [] if there is None else on_nodes(there)
        finish(driver, folder / "log")
    finally:
        driver.kill()
        driver.wait()
    return found


def shards(store: Path) -> dict[tuple[int, str], str]:
    """The checksum of each unit's rows at each hook point."""
    commits = stores.opened(str(store)).committed()
    return {(unit, hook): shard.xxh3_128 for unit, commit in commits.items() for hook, shard in commit.shards.items()}


def test_harvest_and_run_give_the_same_here_on_a_cluster_and_spread_over_nodes(tmp_path: Path, monkeypatch):
    slow = {"point": "harvester.before_forward", "action": "sleep", "seconds": UNIT_S, "nth": 0}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([slow]))
    model = stores.predictable_model(tmp_path / "model")
    harvest = stores.overrides(Path("../../model"), "store", Path("out"), *TWO, tokens=TOKENS)
    run = ["run", "preset=tiny", "out=out", "pages=null", "wandb.mode=disabled", *TWO]
    where = {}
    for place, cpus in PLACES.items():
        with cluster(cpus) as there:
            where[place, "harvest"] = work(harvest, tmp_path / place / "harvest", "out", there)
            where[place, "run"] = work(run, tmp_path / place / "run", "out", there)
    for command in ("harvest", "run"):
        assert where["one node", command] == [4]
        assert where["three nodes", command] == [0, 2, 2]  # the head has no room for a replica
    harvested = {place: shards(tmp_path / place / "harvest" / "store") for place in PLACES}
    ran = {place: shards(tmp_path / place / "run" / "out" / "store") for place in PLACES}
    weights = {place: files(tmp_path / place / "run" / "out" / "dictionary") for place in PLACES}
    for place in PLACES:
        out = tmp_path / place / "harvest" / "out"
        stores.check_every_row(stores.opened(str(tmp_path / place / "harvest" / "store")), model, out, tokens=TOKENS)
        assert harvested[place] == harvested["here"]
        assert ran[place] == ran["here"]
        assert weights[place] == weights["here"]
