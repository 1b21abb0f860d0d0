"""A BatchTopK step on one rank against autograd of the plain loss, whoever has the batch's best."""

import pytest
import torch
from sae_kernels import reference
from sae_kernels.shard import Shard

from sae_dist.sae.config import BatchTopK
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.step import MeshStep
from tests.allocations import Allocations
from tests.sae_kernels.test_shard import BACKENDS, batch_of, dictionary, optimised_
from tests.train.parallel.mesh_steps import one_step


def step_of(
    n_latents: int, d_model: int, k: int, *, backend="auto", product_dtype=torch.bfloat16, rows_fraction=0.0, **settings
) -> MeshStep:
    sae = BatchTopK(n_latents=n_latents, k=k, k_aux=3, rows_fraction=rows_fraction)
    shard = Shard(
        k=k, k_aux=3, aux_coefficient=1 / 32, dead_after_tokens=100, backend=backend, product_dtype=product_dtype,
        **dictionary(n_latents, d_model),
    )  # fmt: skip
    return MeshStep(shard, Mesh.single(), sae=sae, k_aux=3, **settings)


def inputs(kind: str, batch: int, d_model: int) -> torch.Tensor:
    x = batch_of(batch, d_model)
    match kind:
        case "one row has the best":
            x[batch // 2] *= 200
        case "rows tie":
            x[1::2] = x[::2][: len(x[1::2])]
    return x


SHAPES = [(1, 8, 4, 1), (6, 64, 19, 4), (70, 5000, 33, 7)]  # batch, n_latents, d_model, k
KINDS = ["spread", "one row has the best", "rows tie", "few are positive"]


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead_share", [0.0, 0.3])
@pytest.mark.parametrize("backend, width", [("torch", 2), ("auto", 2), ("auto", None)])
def test_gradients_match_autograd_in_double_precision(batch, n_latents, d_model, k, kind, dead_share, backend, width):
    # a plain product may differ by where a row lies in it, and two equal rows be cut otherwise: operands in bf16 and
    # few dimensions leave sums that tie on purpose only
    step, x = step_of(n_latents, d_model, k, backend=backend, width=width), inputs(kind, batch, d_model)
    shard = step.shard
    if kind == "few are positive":
        shard.b_enc -= 3.3 * d_model**0.5
    n_dead = round(dead_share * n_latents)
    shard.tokens_since_fired[torch.randperm(n_latents, generator=torch.Generator().manual_seed(2))[:n_dead]] = 100
    statistics = step.forward(x, variance=1.7)
    d_enc, d_dec, d_b_enc, through = shard.stages.row_gradients()
    found = reference.Gradients(d_enc.t(), d_dec, d_b_enc, step._d_b_dec(through))
    expected, expected_statistics = reference.topk_gradients(
        x.double(), *(p.double() for p in (shard.W_enc, shard.W_dec, shard.b_enc, shard.b_dec)), k=k,
        variance=torch.tensor(1.7), dead=shard.dead, k_aux=3, aux_coefficient=1 / 32, product_dtype=torch.bfloat16,
        over="batch",
    )  # fmt: skip
    assert torch.equal(statistics.fired, expected_statistics.fired)
    assert int(statistics.active) == int(expected_statistics.active)
    assert (kind == "few are positive") == (int(statistics.active) < batch * k)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):  # fp32 sums of at most batch * k terms
        tolerance = 2e-5 * theirs.abs() + 4e-6 * float(theirs.abs().max() + 1e-6)
        assert bool(((ours - theirs).abs() <= tolerance).all()), name
    torch.testing.assert_close(statistics.squared_error.double(), expected_statistics.squared_error, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        statistics.aux_squared_error.double(), expected_statistics.aux_squared_error, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_gradient_projection_adam_and_unit_norm(backend):
    step, state = step_of(200, 24, 5, backend=backend), {}
    twin = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    smallest = []
    for number in (1, 2, 3):
        x = batch_of(40, 24, seed=number)
        z = reference.pre_activations(x, twin["W_enc"], twin["b_enc"], twin["b_dec"], product_dtype=torch.bfloat16)
        smallest.append(float(reference.batch_topk(z, 5).values.min()))
        gradients, _ = reference.topk_gradients(
            x, twin["W_enc"], twin["W_dec"], twin["b_enc"], twin["b_dec"], k=5, variance=torch.tensor(2.0),
            dead=torch.zeros(200, dtype=torch.bool), k_aux=0, aux_coefficient=0, product_dtype=torch.bfloat16,
            over="batch",
        )  # fmt: skip
        optimised_(twin, gradients, step=number, lr=1e-3)
        one_step(step, x, lr=1e-3, variance=2.0)
        state = step.state_dict()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):  # Adam divides by |gradient|, which may be near rounding
        torch.testing.assert_close(state[name], twin[name], rtol=1e-4, atol=3e-5)
    assert float(state["threshold"]) == pytest.approx(sum(smallest) / 3, rel=1e-4)


def test_the_first_steps_choose_within_rows_and_the_threshold_begins_with_the_others():
    step, x = step_of(200, 24, 5, rows_fraction=0.5), inputs("one row has the best", 40, 24)
    z = reference.pre_activations(
        x, *(tensor.clone() for tensor in (step.shard.W_enc, step.shard.b_enc, step.shard.b_dec)),
        product_dtype=torch.bfloat16,
    )  # fmt: skip
    by_row = torch.bincount(reference.topk(z, 5).indices.flatten(), minlength=200)
    assert torch.equal(step.forward(x, variance=2.0, progress=0.49).fired, by_row)
    step.update_(lr=0.0)
    assert float(step.threshold) == 0
    best = reference.batch_topk(z, 5)
    by_batch = torch.bincount(best.indices, minlength=200)
    assert torch.equal(step.forward(x, variance=2.0, progress=0.5).fired, by_batch) and not torch.equal(
        by_row, by_batch
    )
    step.update_(lr=0.0)
    assert float(step.threshold) == pytest.approx(float(best.values.min()), rel=1e-3)


def test_a_step_that_is_left_out_or_looked_at_leaves_the_threshold_alone():
    step = step_of(64, 8, 4)
    one_step(step, batch_of(30, 8), lr=1e-3, variance=1.0)
    before = float(step.threshold)
    step.forward(10 * batch_of(30, 8), variance=1.0)
    step.skip_()
    bad = batch_of(30, 8)
    bad[3, 2] = torch.nan
    one_step(step, bad, lr=1e-3, variance=1.0)
    assert before > 0 and float(step.threshold) == before


def test_no_tensor_is_as_large_as_the_dense_activations():
    batch, n_latents = 600, 9000
    step = step_of(n_latents, 16, 4)
    step.shard.tokens_since_fired[::2] = 100
    x = batch_of(batch, 16)
    x[7] *= 1e4
    with Allocations() as seen:
        one_step(step, x, lr=1e-3, variance=1.0)
    assert step.widened > 4
    assert 0 < max(seen.bytes) < 4 * batch * n_latents / 10


def test_widening_is_the_same_to_the_bit_as_a_width_that_is_enough():
    x = batch_of(40, 24)
    x[3] *= 30
    states = []
    for width in (1, 200):
        step = step_of(200, 24, 5, width=width)
        one_step(step, x, lr=1e-3, variance=2.0)
        states.append(step.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
