"""Checkpoints of several processes: any mesh reads what any other wrote, and a failure of one is everybody's."""

import json
from typing import Any

import pytest

from sae_dist import storage
from sae_dist.storage import StorageError, Unavailable
from sae_dist.train.checkpoint import Checkpoint
from sae_dist.train.checkpoint_folders import folders
from sae_dist.train.checkpoint_manifest import read_manifest
from sae_dist.train.parallel import mesh_checkpoints as module
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.mesh_checkpoints import Checkpoints, Failure
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


class Failing:
    """A storage whose objects can be neither read nor written while there is an `error`."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.error = inner, None

    def __getattr__(self, name: str) -> Any:
        if name in ("read", "write") and self.error is not None:
            raise self.error
        return getattr(self._inner, name)


def test_storage_that_does_not_answer_is_told_from_one_that_refuses(tmp_path):
    """The first is worth another try, of the whole command; the second needs a person."""
    place: Any = Failing(storage.open(tmp_path))
    checkpoints = Checkpoints(Mesh.single(), place, ranks.RUN_ID)
    state = Checkpoint(5, dict(ranks.whole(5)), {"scale": 0.5})
    checkpoints.save(state)
    for error, kind in ((Unavailable("away"), Unavailable), (OSError(5, "a broken disk"), StorageError)):
        place.error = error
        with pytest.raises(kind) as written:
            checkpoints.save(state)
        with pytest.raises(kind) as read:
            checkpoints.latest()
        assert type(written.value) is type(read.value) is kind


def test_ranks_of_which_one_is_refused_are_refused():
    with pytest.raises(Unavailable, match="rank 0: a; rank 2: b"):
        module._raise_any(StorageError, [Failure("a", True), None, ["b", True]])
    with pytest.raises(StorageError, match="rank 0: a; rank 1: b") as mixed:
        module._raise_any(StorageError, [["a", True], ["b", False]])
    assert type(mixed.value) is StorageError
    module._raise_any(StorageError, [None, None])
