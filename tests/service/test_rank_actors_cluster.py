"""A mesh of actors on several nodes: one node is lost, another one comes; a Ray that believes in GPUs; Ray Train."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.service.clusters import LoopbackCluster
from tests.service.test_harvest_cluster import HEALTH
from tests.service.test_rank_actors import command, finish, order_hash, start, store, uninterrupted, wait_until, weights

__all__ = ["store", "uninterrupted"]  # fixtures
pytestmark = pytest.mark.slow
STEP_S = 0.2  # that every step takes longer, so that there is time for harm


class Nodes:
    """A cluster of a head without room and nodes with room for a rank each."""

    def __init__(self, count: int) -> None:
        os.environ["SAE_DIST_FAULTS"] = json.dumps(
            [{"point": "train.step", "action": "sleep", "seconds": STEP_S, "nth": 0}]
        )
        head = {"num_cpus": 0, "_system_config": HEALTH, "include_dashboard": False, "object_store_memory": 80 << 20}
        self.cluster = LoopbackCluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add() for _ in range(count)]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def lose(self, node: Any) -> list[psutil.Process]:
        """SIGKILL to the node; returns what ran there."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        there = raylet.children()
        raylet.kill()
        return there

    def close(self) -> None:
        self.cluster.shutdown()
        del os.environ["SAE_DIST_FAULTS"]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(2)
    yield nodes
    nodes.close()


def saved(out: Path) -> bool:
    return any((out / "checkpoints").glob("step_*/checkpoint.json"))


def begun(store: Path, out: Path, nodes: Nodes, *more: str) -> subprocess.Popen[str]:
    """A training on the nodes that has saved its first checkpoint."""
    driver = start(command(store, out, f"cluster={nodes.cluster.address}", *more))
    wait_until(lambda: saved(out), driver)
    return driver


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(store, uninterrupted, nodes, tmp_path):
    driver = begun(store, tmp_path / "run", nodes)
    there = nodes.lose(nodes.workers[1])
    nodes.add()
    said = finish(driver)
    assert "the trainer died; restarting it from step_" in said
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert order_hash(tmp_path / "run") == order_hash(uninterrupted)
    _, alive = psutil.wait_procs(there, timeout=60)
    assert not alive, f"left behind: {alive}"


def test_ray_train_goes_on_with_fewer_data_ranks_when_a_node_is_lost(store, uninterrupted, nodes, tmp_path):
    """All rows are still trained on once, in their order."""
    more = ("train.launcher=ray_train", "mesh.feature=1", "mesh.data=2", "mesh.least_data=1")
    driver = begun(store, tmp_path / "run", nodes, *more)
    nodes.lose(nodes.workers[1])
    said = finish(driver)
    assert "Ray Train starts the ranks again, from the last checkpoint (" in said
    assert "training with 1 data ranks of mesh.data=2" in said
    assert order_hash(tmp_path / "run") == order_hash(uninterrupted)
    assert (tmp_path / "run" / "ray_train").is_dir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_ranks_ask_ray_for_a_gpu_each_and_say_when_torch_cannot_use_it(store, tmp_path):
    cluster = LoopbackCluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False}
    )
    try:
        at = f"cluster={cluster.address}"
        for number, more in enumerate([(), ("train.launcher=ray_train",)]):
            said = finish(start(command(store, tmp_path / str(number), at, *more)), 2)
            (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert "Ray gave a rank a GPU of " in line and line.endswith("or use train.device=cpu")
            assert "died" not in said and "again" not in said  # it would end the same way
        said = finish(start(command(store, tmp_path / "many", at, "mesh.feature=3", "train.device=cuda")), 2)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "train.device=cuda needs 3 GPUs for mesh.data=1 x mesh.feature=3, one a rank, but the cluster" in line
        finish(start(command(store, tmp_path / "cpu", at, "train.device=cpu")))
    finally:
        cluster.shutdown()
