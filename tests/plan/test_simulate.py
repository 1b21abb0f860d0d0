"""The plan's formulas against the program itself, on meshes that no machine here could hold."""

import pytest
from sae_kernels.row_state import StateOptions

from sae_dist.cli.compose import compose
from sae_dist.config import load
from sae_dist.plan.machine import Machine
from sae_dist.plan.memory import memory, state_bytes
from sae_dist.plan.parallel.simulate import simulate
from sae_dist.plan.traffic import by_name
from sae_dist.plan.workload import Workload
from sae_dist.sae.config import BatchTopK, JumpReLU, TopK

KINDS = [TopK, BatchTopK, JumpReLU]
WIDE = [(1, 64), (2, 64), (1, 512), (8, 64), (4, 256)]


def check(data, feature, kind, state=StateOptions()):  # noqa: B008  immutable
    """Shapes, exchanges and memory of rank 0, one step of 34M latents x 4,096."""
    work = Workload(
        sae=kind(n_latents=2**25, k=64, k_aux=0), d_model=4096, batch=131_072, data=data, feature=feature, lanes=64,
        state=state,
    )  # fmt: skip
    found = simulate(work)
    assert found.shapes["W_dec"] == (2**25 // feature, 4096)
    assert found.shapes["first.W_enc"] == (4096, 2**25 // feature)
    assert found.moved == by_name(work)  # calls and bytes of every exchange, to the byte
    assert found.state_bytes == pytest.approx(state_bytes(work), rel=1e-6)
    plain = load(Machine, compose("plan", ["machine=h100"])["machine"] | {"backend": "torch", "runtime": 0})
    planned = sum(part.bytes for part in memory(work, plain) if not part.name.startswith(("loader", "checkpoint")))
    assert planned == pytest.approx(found.peak_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("data", "feature", "kind"),
    [
        (1, 64, TopK),
        (2, 64, BatchTopK),
        (8, 128, JumpReLU),
        pytest.param(8, 128, TopK, marks=pytest.mark.slow),
        pytest.param(8, 128, BatchTopK, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_34_million_latents_does_what_the_plan_says(data, feature, kind):
    check(data, feature, kind)


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["float32", "int8", "factored"])
@pytest.mark.parametrize("kind", KINDS)
def test_so_does_one_of_any_compact_state(kind, moments):
    """On more ranks: a compact state is updated some rows at a time, each of which is simulated."""
    check(1, 512, kind, StateOptions("bfloat16_stochastic", moments))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "feature"), WIDE)
@pytest.mark.parametrize("kind", KINDS)
def test_so_does_every_other_mesh_up_to_1024_ranks(data, feature, kind):
    check(data, feature, kind)


@pytest.mark.parametrize(("data", "feature"), [(1, 2), (2, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_small_and_uneven_meshes_exchange_what_the_plan_says(data, feature, kind):
    for state in (StateOptions(), StateOptions("bfloat16_stochastic", "factored")):
        work = Workload(
            sae=kind(n_latents=1000, k=4, k_aux=0), d_model=64, batch=130, data=data, feature=feature, state=state
        )
        assert simulate(work).moved == by_name(work)
