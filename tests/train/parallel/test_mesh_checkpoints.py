"""Checkpoints of several processes: any mesh reads what any other wrote, and a failure of one is everybody's."""

import json

import pytest

from sae_dist import storage
from sae_dist.train.checkpoint import Checkpoint
from sae_dist.train.checkpoint_folders import folders
from sae_dist.train.checkpoint_manifest import read_manifest
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.mesh_checkpoints import Checkpoints
from tests.processes import PROCESSES
from tests.train.parallel import checkpoint_ranks as ranks


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_any_mesh_reads_what_any_other_wrote_and_a_failure_is_everybodys(tmp_path, world):
    place = storage.open(tmp_path / "checkpoints")
    alone = Checkpoints(Mesh.single(), place, ranks.RUN_ID)
    alone.save(Checkpoint(5, dict(ranks.whole(5)), {"scale": 0.5}))
    started = [PROCESSES.Process(target=ranks.main, args=(tmp_path, rank, world)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0] * world
    for rank in range(world):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        failures = {name: told.pop(name) for name in list(told) if name.endswith("fails")}
        assert failures and all(f"rank {world - 1}: fault at checkpoint.before_file" in f for f in failures.values())
        assert told and all(told.values()), told
    last = alone.latest()
    assert last is not None
    assert all(last.tensors[name].equal(tensor) for name, tensor in ranks.whole(last.step).items())  # pyright: ignore[reportAttributeAccessIssue]
    replicas_wrote_once = read_manifest(place, folders(place)[-2])  # data x 1
    assert {file.name[:9] for file in replicas_wrote_once.files} == {f"rank{rank:05d}" for rank in range(world)}
