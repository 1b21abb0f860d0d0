"""The Triton kernels on a mesh: over nccl where there is a GPU a rank, else interpreted, over gloo: the same test.

Interpreted kernels take a second a step, so dictionaries are tiny; what changes with size is tested without Triton.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sae_kernels.reference import EMPTY, Selected
from sae_kernels.shard import Shard
from sae_kernels.stages import LossTerm

from sae_dist.train.parallel.mesh import Mesh
from tests.sae_kernels.interpreted import bf16_as_on_a_gpu
from tests.train.parallel.mesh_steps import CASES, Case, batch_of, parameters, train
from tests.train.parallel.test_step import REPLICATED, by_use, on_mesh, whole

NAMES = [name for name, case in CASES.items() if case.backend == "triton"]
NATIVE = torch.cuda.device_count() >= 2


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with bf16_as_on_a_gpu():
        yield


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "data, feature, case",
    [
        pytest.param(data, feature, case, marks=() if NATIVE else pytest.mark.slow)
        for case in NAMES
        for data, feature in ((1, 2), (2, 1))
    ],
)
def test_two_ranks_select_and_learn_what_one_does(tmp_path, device, data, feature, case):
    ranks = on_mesh(tmp_path / "ranks", data, feature, [case])[case]
    in_stages = replace(CASES[case], micro_batch=CASES[case].micro_batch or CASES[case].batch)
    alone = train(in_stages, Mesh.single(device))
    assert torch.equal(by_use(torch.cat([rank["chosen"] for rank in ranks[:feature]])), by_use(alone["chosen"]))
    assert (alone["chosen"][:, 1] == 1).any() and 0 < alone["figures"][-1, 3] < 1, "AuxK had nothing to do"
    torch.testing.assert_close(ranks[0]["figures"], alone["figures"], rtol=1e-4, atol=1e-9)
    for name, tensor in whole(ranks, feature).items():
        # a product in bf16 rounds what another order of sums has moved, and Adam's first steps are of length lr
        tolerance = 2e-4 * float(alone["state"][name].double().abs().max())
        torch.testing.assert_close(tensor, alone["state"][name], rtol=1e-3, atol=tolerance, msg=name)
    for number, rank in enumerate(ranks):
        assert all(calls > 0 and seconds > 0 for calls, _, seconds in rank["moved"].values()), rank["moved"]
        assert torch.equal(rank["figures"], ranks[0]["figures"])
        for name, tensor in rank["state"].items():
            twin = ranks[0] if name in REPLICATED else ranks[number % feature]
            assert torch.equal(tensor, twin["state"][name]), f"{name} of rank {number}"


@pytest.mark.parametrize("rows", [1, 5])
def test_every_stage_gives_what_plain_torch_does(device, rows):
    """A part of a dictionary, AuxK's selection among the dead, places that are empty, weights of their own, a level."""
    case = replace(CASES["triton"], batch=rows, k=4)
    whole, x = parameters(case), batch_of(case, 0).to(device)
    triton, plain = (
        Shard(
            *(whole[name].to(device) for name in ("W_enc", "W_dec")), b_enc=whole["b_enc"].to(device),
            b_dec=(whole["b_dec"] + 0.1).to(device), k=case.k, k_aux=case.k_aux, aux_coefficient=1 / 32,
            dead_after_tokens=1, backend=backend,
        )
        for backend in ("triton", "torch")
    )  # fmt: skip
    for ours, expected in zip(results(triton, case, x), results(plain, case, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5 * float(expected.double().abs().max()))


def results(step: Shard, case: Case, x: torch.Tensor) -> list[torch.Tensor]:
    """All that the stages of a step say, and the state after it."""
    stages, some = step.stages, torch.arange(1, case.n_latents, 3, device=x.device)
    rows = stages.rows(x)
    main, aux = stages.select(rows, k=case.k), stages.select(rows, k=case.k_aux, latents=some)
    here = main.indices < case.n_latents // 2  # the others are another part's
    main = Selected(torch.where(here, main.values, 0.0), torch.where(here, main.indices, EMPTY))
    uses = []
    for selected, scale in ((main, -0.1), (aux, -0.02)):
        errors = x - stages.partial(selected)
        uses.append(LossTerm(errors, selected, stages.d_z(errors, selected, scale=scale), scale))
    weights = 0.3 * main.values.square() - 0.05 * main.there  # of a value that is not z: here also below 0
    uses[0] = uses[0]._replace(weights=weights)
    stages.save_for_backward_(rows, uses)
    level = torch.linspace(0, 0.5, case.n_latents, device=x.device)
    above = stages.select(rows, k=case.k, level=level)
    said = [*above]
    said += [*stages.row_gradients(), stages.update_latents_(None, step.begin_update_(1e-3))]
    for errors, selected, d_z, *_ in uses:
        said += [errors, *selected, d_z]
    return said + [tensor for _, tensor in sorted(step.state_dict().items())]
