"""Places for passes within a budget, and how many points memory holds."""

import os

import pytest

from sae_dist.config import UserError, load
from sae_dist.service import sweep_room
from sae_dist.service.config import TrainJob
from sae_dist.service.sweep_room import Memory, Sizes, Slot, slots
from sae_dist.sweep.config import SweepConfig


def job(**changes) -> TrainJob:
    base = {
        "out": "runs/a", "store": "/s", "sae": {"kind": "topk", "n_latents": 8192, "k": 32}, "order": {},
        "train": {}, "wandb": {},
    }  # fmt: skip
    return load(TrainJob, base | changes)


@pytest.fixture
def machine(monkeypatch):
    """Eight cores and no GPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(sweep_room, "usable_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("budget", "changes", "expected"),
    [
        ({}, {}, [Slot()]),
        ({"jobs": 2}, {}, [Slot((0, 1, 2, 3)), Slot((4, 5, 6, 7))]),
        ({"cpus": 3}, {}, [Slot((0, 1, 2))]),
        ({"cpus": 4}, {"train": {"threads": 2}}, [Slot((0, 1)), Slot((2, 3))]),
        ({"cpus": 6, "jobs": 3}, {}, [Slot((0, 1)), Slot((2, 3)), Slot((4, 5))]),
        ({"gpus": 16}, {"cluster": "head:6379", "mesh": {"feature": 4}}, [Slot()] * 4),
        ({"cpus": 6}, {"cluster": "head:6379", "mesh": {"data": 2}}, [Slot()] * 3),
        ({}, {"cluster": "head:6379"}, [Slot()]),
    ],
)
def test_passes_get_cores_of_their_own(machine, budget, changes, expected):
    assert slots(SweepConfig(**budget), job(**changes)) == expected


@pytest.mark.parametrize(
    ("budget", "mesh", "expected"),
    [({}, {}, ["0", "1", "2", "3"]), ({"gpus": 2}, {}, ["0", "1"]), ({"jobs": 1}, {"feature": 2}, ["0,1"]),
     ({}, {"feature": 2}, ["0,1", "2,3"])],
)  # fmt: skip
def test_passes_get_gpus_of_their_own(machine, monkeypatch, budget, mesh, expected):
    monkeypatch.setattr(sweep_room, "usable_gpus", lambda: 4)
    assert [",".join(slot.gpus or ()) for slot in slots(SweepConfig(**budget), job(mesh=mesh))] == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert slots(SweepConfig(gpus=1), job())[0].gpus == ("4",)


@pytest.mark.parametrize(
    ("budget", "changes", "said"),
    [
        ({"gpus": 1}, {}, "sweep.gpus=1, but this process can use 0"),
        ({"cpus": 9}, {}, "sweep.cpus=9, but this process may use 8"),
        ({"jobs": 9}, {}, "sweep.jobs=9 passes at a time for 8 cores"),
        ({"gpus": 3}, {"cluster": "head:6379", "mesh": {"feature": 4}}, "a pass takes 4 ranks"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(machine, budget, changes, said):
    with pytest.raises(UserError, match=said):
        slots(SweepConfig(**budget), job(**changes))


def test_a_cluster_wants_its_memory_said(machine):
    with pytest.raises(UserError, match=r"sweep.memory_gb is null, and what a machine of cluster=head:6379 has"):
        sweep_room.measured(SweepConfig(), [Slot()], "head:6379")
    assert sweep_room.measured(SweepConfig(memory_gb=80, gpus=8), [Slot()], "head:6379").backend == "triton"


def test_memory_holds_as_many_points_as_the_formula_of_plan_says():
    of = Sizes(d_model=768, sites=1, rows=1_000_000, stored_bytes=2, slice_rows=8192)
    one, program = job(), 5e8
    alone = next(gb for gb in range(1, 100) if Memory(gb * 1e8, "cpu", program).fits([one], of))
    nine = next(gb for gb in range(1, 200) if Memory(gb * 1e8, "cpu", program).fits([one] * 9, of))
    weights = 9 * 8192 * 768 * 2 * 16 / 1e8  # parameters, moments and a checkpoint's copy of nine, less one's
    assert alone < nine < 9 * alone and 0.5 * weights < nine - alone < 2 * weights
    assert not Memory(nine * 1e8 - 2e8, "cpu", program).fits([one] * 9, of)
