"""Steps on a mesh of real processes against one process: the same latents, counters and figures, the same weights."""

from pathlib import Path

import pytest
import torch
from sae_kernels.cpu.build import library

from sae_dist.train.parallel.mesh import Mesh
from tests.processes import PROCESSES
from tests.train.parallel import mesh_steps
from tests.train.parallel.mesh_steps import CASES, train

SLOW = ["long", "batch_long", "cross_layer_long", "skip_clipped", "transcoder_long", "two_rounds_owned"]
FAST = [  # a bf16 product rounds what 1e-8 has moved
    name for name, case in CASES.items() if name not in SLOW and case.product_dtype == torch.float32
]
REPLICATED = ("b_dec", "first.b_dec", "second.b_dec", "b_in", "W_skip")  # and what is one number


def on_mesh(folder: Path, data: int, feature: int, cases: list[str]) -> dict[str, list[dict]]:
    """What every rank of a mesh of processes says of every case, by rank."""
    folder.mkdir(parents=True)
    ranks = [
        PROCESSES.Process(target=mesh_steps.main, args=(rank, data, feature, folder, cases))
        for rank in range(data * feature)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(500)
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(data * feature)] for name in cases}


def whole(ranks: list[dict], feature: int) -> dict[str, torch.Tensor]:
    """The dictionary's state from the parts of the first data rank."""
    parts = [rank["state"] for rank in ranks[:feature]]
    return {
        name: tensor
        if name in REPLICATED or not tensor.ndim
        else torch.cat([p[name] for p in parts], 1 if "W_enc" in name else 0)
        for name, tensor in parts[0].items()
    }


def by_use(chosen: torch.Tensor) -> torch.Tensor:
    """The selected (step, use, row, latent) in one order."""
    return torch.unique(chosen, dim=0)


def check_equal(ranks: list[dict], alone: dict, data: int, feature: int) -> None:
    assert torch.equal(by_use(torch.cat([rank["chosen"] for rank in ranks[:feature]])), by_use(alone["chosen"]))
    state = whole(ranks, feature)
    assert torch.equal(state["tokens_since_fired"], alone["state"]["tokens_since_fired"])
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(state[name], alone["state"][name], rtol=0, atol=1e-6, msg=name)
    if "threshold" in state:
        torch.testing.assert_close(state["threshold"], alone["state"]["threshold"], rtol=1e-6, atol=1e-6)
    # sums of squares in fp32, added in another order
    torch.testing.assert_close(ranks[0]["figures"], alone["figures"], rtol=2e-6, atol=1e-12)
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["figures"], ranks[0]["figures"])
        for name, tensor in rank["state"].items():
            twin = ranks[0] if name in REPLICATED or not tensor.ndim else ranks[number % feature]
            assert torch.equal(tensor, twin["state"][name]), f"{name} of rank {number}"


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {name: train(case, Mesh.single()) for name, case in CASES.items() if case.backend != "triton"}
    torch.set_num_threads(threads)
    return results


@pytest.fixture(scope="module")
def meshed(tmp_path_factory) -> dict[str, list[dict]]:
    return on_mesh(tmp_path_factory.mktemp("mesh") / "2x2", 2, 2, FAST)


@pytest.mark.parametrize("case", FAST)
def test_two_by_two_ranks_select_and_learn_what_one_does(meshed, alone, case):
    check_equal(meshed[case], alone[case], 2, 2)


def test_the_cases_are_what_they_claim(alone):
    """AuxK had work, one part or row had all of the best, ties crossed parts and rows, clipping clipped."""
    assert (alone["short"]["chosen"][:, 1] == 1).any() and 0 < alone["long"]["figures"][-1, 3] < 1
    owned = alone["owned"]["chosen"]
    assert owned[owned[:, 1] == 0][:, 3].max() < 97 // 4
    assert not torch.equal(alone["clipped"]["state"]["W_dec"], alone["short"]["state"]["W_dec"])
    ties = alone["ties"]["chosen"]
    latents = ties[(ties[:, 1] == 0) & (ties[:, 2] == 0)][:, 3]
    assert len(torch.unique(latents % 6)) < len(latents)
    for case in ("batch", "batch_owned", "batch_row", "batch_few", "batch_ties", "batch_micro"):
        fewer = (alone[case]["figures"][:, 2] < CASES[case].k * CASES[case].batch).tolist()
        assert sum(fewer) >= 8 if case == "batch_few" else not any(fewer), case
    owned = alone["batch_owned"]["chosen"]
    assert owned[owned[:, 1] == 0][:, 3].max() < 97 // 4
    of_row = alone["batch_row"]["chosen"]
    assert ((of_row[:, :3] == 0).all(1)).sum() > 40  # of row 0, in step 0
    assert alone["batch_row"]["widened"] >= 12 and alone["batch_micro"]["widened"] > 0
    ties = alone["batch_ties"]["chosen"]
    used = [(ties[:, 1] == 0) & (ties[:, 2] == row) for row in range(46)]
    assert any(int(used[row].sum()) != int(used[row + 23].sum()) for row in range(23))  # equal rows, cut differently


def test_the_number_of_data_ranks_does_not_show(tmp_path, alone):
    """Bit for bit, where a row's product does not depend on the rows beside it, as in the compiled kernels."""
    split = on_mesh(tmp_path / "3x1", 3, 1, ["kernels", "batch_kernels", "short"])
    check_equal(split["short"], alone["short"], 3, 1)
    for case in ("kernels", "batch_kernels"):
        for name, tensor in alone[case]["state"].items():
            for rank in split[case]:
                if library() is None:
                    torch.testing.assert_close(rank["state"][name], tensor, rtol=1e-4, atol=1e-4)
                else:
                    assert torch.equal(rank["state"][name], tensor), f"{name} of {case}"


@pytest.mark.slow
@pytest.mark.parametrize("data, feature", [(d, f) for d in (1, 2) for f in (1, 2, 3, 4)])
def test_two_hundred_steps_are_the_same_on_every_mesh(alone, tmp_path, data, feature):
    for case, ranks in on_mesh(tmp_path / "mesh", data, feature, [*FAST, *SLOW]).items():
        check_equal(ranks, alone[case], data, feature)
