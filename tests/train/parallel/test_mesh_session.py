"""What a rank says when it cannot go on, or must not begin: real processes that meet."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sae_kernels.cpu.build import library

from sae_dist.config import UserError
from sae_dist.parallel.key_value import StoreAddress
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.order import OrderConfig
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.mesh import Axis, Mesh
from sae_dist.train.parallel.mesh_loader import MeshLoader
from sae_dist.train.parallel.mesh_session import mesh_session
from sae_dist.train.parallel.rendezvous import Rendezvous, serve, torchrun_rendezvous
from tests.processes import PROCESSES
from tests.train.test_loop import full_store

DATA, FEATURE = MeshConfig(data=2, collective_timeout_s=20), MeshConfig(feature=2, collective_timeout_s=20)

Does = Callable[[int], object]


def rank_of(folder: Path, place: StoreAddress, config: MeshConfig, rank: int, does: Does) -> None:
    try:
        with mesh_session(config, Rendezvous(place, "a"), rank=rank, world=2):
            does(rank)
            dist.barrier()
        (folder / str(rank)).write_text("done")
    except Exception as error:
        (folder / str(rank)).write_text(f"{type(error).__name__}: {error}")


def without_a_compiler(
    folder: Path, place: StoreAddress, config: MeshConfig, rank: int, does: Callable[[int], object]
) -> None:
    if rank == 1:
        os.environ["CXX"] = "/nowhere"
    rank_of(folder, place, config, rank, does)


def on_more_threads(
    folder: Path, place: StoreAddress, config: MeshConfig, rank: int, does: Callable[[int], object]
) -> None:
    torch.set_num_threads(rank + 1)
    rank_of(folder, place, config, rank, does)


def told(folder: Path, config: MeshConfig, does: Callable[[int], object], start: Callable = rank_of) -> list[str]:
    """How both ranks ended, in words."""
    served = serve("127.0.0.1")
    ranks = [PROCESSES.Process(target=start, args=(folder, served.address, config, rank, does)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [path.read_text() if (path := folder / str(rank)).exists() else "" for rank in range(2)]


def too_much(rank: int) -> None:
    if rank == 0:
        torch.empty(1 << 50)


def wrong(rank: int) -> None:
    if rank == 0:
        torch.add(torch.zeros(2), torch.zeros(3))


def goes_on(_: int) -> None: ...


def test_copies_that_would_be_computed_with_different_kernels_are_refused(tmp_path):
    if library() is None:
        pytest.skip("no compiler here")
    for said in told(tmp_path, DATA, goes_on, without_a_compiler):
        assert said.startswith("UserError: rank 0 computes with ") and "rank 1 with plain torch" in said
        assert said.endswith("use mesh.data=1, or the same processor, compiler, torch and OMP_NUM_THREADS")


def test_copies_whose_sums_would_be_made_by_unequal_numbers_of_threads_are_refused(tmp_path):
    for said in told(tmp_path, DATA, goes_on, on_more_threads):
        assert "on 1 threads and rank 1 with" in said and "on 2 threads, so that copies" in said


def test_parts_may_be_computed_with_different_kernels(tmp_path):
    assert told(tmp_path, FEATURE, goes_on, without_a_compiler) == ["done", "done"]


def test_memory_that_is_not_there_is_a_mistake_of_the_configuration(tmp_path):
    first, _ = told(tmp_path, DATA, too_much)
    assert first.startswith("UserError: rank 0 needs more memory than there is (") and "train.micro_batch" in first


def test_a_mistake_of_the_program_is_not_called_a_failing_network(tmp_path):
    first, second = told(tmp_path, DATA, wrong)
    assert first.startswith("RuntimeError: The size of tensor a")
    assert second.startswith("PeersLost: rank 1 cannot go on: rank 0 (")


def test_restarts_by_torchrun_over_several_machines_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match=r"--max-restarts=3 over several machines .* use --max-restarts=0"):
        torchrun_rendezvous(tmp_path, 1.0).__enter__()


def test_a_live_training_on_more_ranks_than_lanes_is_refused(tmp_path):
    store = full_store(tmp_path)
    three = dataclasses.replace(Mesh.single(), world=Axis(0, 3))
    with pytest.raises(UserError, match="order.lanes=2 are fewer than the 3 ranks of a live=true training; raise"):
        MeshLoader(three, store, Hooks(("x",)), order=OrderConfig(lanes=2), start_step=0, order_hash=0, live=True)
