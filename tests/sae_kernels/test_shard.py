"""`Shard` against the reference: gradients, update and state, whichever backend computes them."""

import pytest
import torch
from sae_kernels import reference
from sae_kernels.row_state import StateOptions
from sae_kernels.shard import Shard

from tests.allocations import Allocations

SHAPES = [(1, 8, 4, 1), (5, 64, 19, 4), (3, 64, 16, 64), (70, 5000, 33, 7)]  # batch, n_latents, d_model, k
BACKENDS = ["torch", "auto"]  # auto: the compiled kernels, where the machine can have them


def dictionary(n_latents: int, d_model: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W_dec = reference.unit_norm(torch.randn(n_latents, d_model, generator=generator))
    return {
        "W_enc": (W_dec + 0.1 * torch.randn(n_latents, d_model, generator=generator)).t(),
        "W_dec": W_dec,
        "b_enc": 0.1 * torch.randn(n_latents, generator=generator),
        "b_dec": 0.1 * torch.randn(d_model, generator=generator),
    }


def state(n_latents: int, d_model: int, k: int, **settings) -> Shard:
    settings = {"k_aux": 3, "aux_coefficient": 1 / 32, "dead_after_tokens": 100} | settings
    return Shard(k=k, **dictionary(n_latents, d_model), **settings)


def batch_of(batch: int, d_model: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, d_model, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
@pytest.mark.parametrize("dead_share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize(
    ("backend", "parameters"), [("torch", "float32"), ("auto", "float32"), ("auto", "bfloat16_stochastic")]
)
def test_gradients_match_autograd_in_double_precision(batch, n_latents, d_model, k, dead_share, backend, parameters):
    sae, x = state(n_latents, d_model, k, backend=backend, state=StateOptions(parameters)), batch_of(batch, d_model)
    n_dead = round(dead_share * n_latents)
    sae.tokens_since_fired[torch.randperm(n_latents, generator=torch.Generator().manual_seed(2))[:n_dead]] = 100
    gradients, statistics = sae.gradients(x, variance=1.7)
    expected, expected_statistics = reference.topk_gradients(
        x.double(), *(p.double() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)), k=k,
        variance=torch.tensor(1.7), dead=sae.dead, k_aux=3, aux_coefficient=1 / 32, product_dtype=torch.bfloat16,
    )  # fmt: skip
    # fp32 sums of up to batch * k terms; selection is equal because no two of these pre-activations are that close.
    # The kernels' AuxK takes bf16 operands, each off by 2**-9, e_hat too: 2**-7 of the dead latents' gradient. In the
    # biases, rows of either sign cancel: there the scale is W_enc's gradient.
    dead = torch.zeros(n_latents, dtype=torch.bool) if backend == "torch" else sae.dead
    aux_enc, aux_dec = (2**-7 * float((g.abs() * dead).amax()) for g in (expected.W_enc, expected.W_dec.t()))
    for name, ours, theirs in zip(gradients._fields, gradients, expected, strict=True):
        tolerance = 2e-5 * theirs.abs() + 2e-6 * float(theirs.abs().max() + 1e-6)
        match name:
            case "W_enc":
                tolerance[:, dead] += aux_enc
            case "W_dec":
                tolerance[dead] += aux_dec
            case "b_enc":
                tolerance[dead] += aux_enc
            case "b_dec":
                tolerance += aux_enc * sae.W_enc[:, dead].abs().sum(1)
        assert bool(((ours - theirs).abs() <= tolerance).all()), name
    assert torch.equal(statistics.fired, expected_statistics.fired)
    assert int(statistics.active) == int(expected_statistics.active)
    torch.testing.assert_close(statistics.squared_error.double(), expected_statistics.squared_error, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        statistics.aux_squared_error.double(),
        expected_statistics.aux_squared_error,
        rtol=1e-5 if backend == "torch" else 2**-8,
        atol=0,
    )


def optimised_(twin: dict[str, torch.Tensor], gradients: reference.Gradients, *, step: int, lr: float) -> None:
    """What an update does to a state: projection, Adam, unit norm."""
    projected = gradients._replace(W_dec=reference.remove_parallel(gradients.W_dec, twin["W_dec"]))
    for name, gradient in projected._asdict().items():
        reference.adam_(twin[name], gradient, twin[f"first.{name}"], twin[f"second.{name}"], step=step, lr=lr)
    twin["W_dec"] = reference.unit_norm(twin["W_dec"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_gradient_projection_adam_and_unit_norm(backend):
    sae, x = state(200, 24, 5, backend=backend), batch_of(40, 24)
    twin = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    for step in (1, 2, 3):
        gradients, _ = reference.topk_gradients(
            x, twin["W_enc"], twin["W_dec"], twin["b_enc"], twin["b_dec"], k=5, variance=torch.tensor(2.0),
            dead=torch.zeros(200, dtype=torch.bool), k_aux=3, aux_coefficient=1 / 32, product_dtype=torch.bfloat16,
        )  # fmt: skip
        optimised_(twin, gradients, step=step, lr=1e-3)
        sae.step(x, lr=1e-3, variance=2.0)
    # Adam divides by |gradient|: where that is near rounding, the two may differ by a fraction of lr a step
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(sae.state_dict()[name], twin[name], rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(200), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silent_latents_are_counted_and_die(backend):
    sae, x = state(64, 8, 1, backend=backend), batch_of(30, 8)
    fired = sae.step(x, lr=0.0, variance=1.0).fired
    assert torch.equal(sae.tokens_since_fired, torch.where(fired > 0, 0, 30))
    for _ in range(3):
        sae.step(x, lr=0.0, variance=1.0)
    assert torch.equal(sae.dead, fired == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_not_finite_leaves_the_parameters_alone(backend):
    sae, x = state(64, 8, 4, backend=backend), batch_of(30, 8)
    x[3, 2] = float("nan")
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    statistics = sae.step(x, lr=1e-3, variance=1.0)
    assert not torch.isfinite(statistics.squared_error)
    for name, tensor in sae.state_dict().items():
        assert name == "tokens_since_fired" or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restored_state_continues_bitwise(backend):
    sae = state(200, 24, 5, backend=backend)
    sae.step(batch_of(40, 24), lr=1e-3, variance=2.0)
    saved = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.step(batch_of(40, 24, seed=5), lr=1e-3, variance=2.0)
    other = state(200, 24, 5, backend=backend)
    other.load_state_dict_(saved)
    other.step(batch_of(40, 24, seed=5), lr=1e-3, variance=2.0)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, sae.state_dict()[name]), name


def test_a_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"W_enc is .*\[24, 200\] and must be .*\[24, 100\]"):
        state(100, 24, 5).load_state_dict_(state(200, 24, 5).state_dict())


def test_k_beyond_the_dictionary_is_refused():
    with pytest.raises(ValueError, match="k=9 with n_latents=8"):
        state(8, 4, 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reducing_between_gradient_and_update_is_a_step(backend):
    whole, x = state(200, 24, 5, backend=backend), batch_of(40, 24)
    parts = state(200, 24, 5, backend=backend)
    for seed in range(3):
        x = batch_of(40, 24, seed=seed)
        whole.step(x, lr=1e-3, variance=2.0)
        gradients, statistics = parts.gradients(x, variance=2.0)
        parts.update_(gradients, lr=1e-3)
        parts.count_(statistics.fired, tokens=40)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    x = batch_of(40, 24, seed=9)  # what the parameters' rounded copy gives
    assert torch.equal(whole.encode(x).values, parts.encode(x).values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensor_is_as_large_as_the_dense_activations(backend):
    batch, n_latents = 600, 9000
    sae = state(n_latents, 16, 4, backend=backend)
    sae.tokens_since_fired[::2] = 100
    with Allocations() as seen:
        sae.step(batch_of(batch, 16), lr=1e-3, variance=1.0)
    assert 0 < max(seen.bytes) < 4 * batch * n_latents


COMPACT = [StateOptions(p, m) for p in ("float32", "bfloat16_stochastic") for m in ("float32", "int8", "factored")]


def trained(options: StateOptions, steps: range, sae: Shard | None = None, *, lr: float = 1e-3) -> Shard:
    sae = sae or state(300, 24, 5, state=options, dead_after_tokens=150)
    for step in steps:
        sae.step(batch_of(40, 24, seed=step), lr=lr, variance=2.0)
    return sae


@pytest.mark.parametrize("dead_share", [0.0, 0.02, 1.0])
def test_gradients_made_a_block_of_latents_at_a_time_are_the_dense_ones(dead_share):
    batch, x = 70, batch_of(70, 33)
    theirs = state(5000, 33, 7, backend="torch")
    ours = state(5000, 33, 7, backend="torch", state=StateOptions("float32", "int8"))
    for sae in (theirs, ours):
        sae.tokens_since_fired[: round(dead_share * 5000)] = 100
    (expected, expected_statistics), (found, statistics) = (s.gradients(x, variance=1.7) for s in (theirs, ours))
    for name, a, b in zip(expected._fields, found, expected, strict=True):  # sums of at most batch terms in fp32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-7 * batch * float(b.abs().max()), msg=name)
    assert torch.equal(statistics.fired, expected_statistics.fired)
    torch.testing.assert_close(statistics.aux_squared_error, expected_statistics.aux_squared_error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", COMPACT[1:])
def test_a_step_from_pairs_is_the_step_from_dense_gradients(options, backend):
    ours, theirs = (state(300, 24, 5, state=options, backend=backend) for _ in range(2))
    for seed in range(1, 4):
        x = batch_of(40, 24, seed)
        ours.step(x, lr=1e-3, variance=2.0)
        gradients, statistics = theirs.gradients(x, variance=2.0)
        theirs.update_(gradients, lr=1e-3)
        theirs.count_(statistics.fired, tokens=40)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def error(sae: Shard) -> float:
    return float(sae.gradients(batch_of(400, 24, 7), variance=1.0)[1].squared_error)


@pytest.fixture(scope="module")
def error_in_fp32() -> float:
    return error(trained(COMPACT[0], range(30), lr=4e-3))


@pytest.mark.parametrize("options", COMPACT[1:])
def test_compact_state_learns_what_fp32_learns(options, error_in_fp32):
    """The error on a batch after 30 steps: fp32's or less within 5 %, having fallen by a fifth."""
    assert error_in_fp32 < 0.8 * error(state(300, 24, 5))
    assert error(trained(options, range(30), lr=4e-3)) < 1.05 * error_in_fp32


@pytest.mark.parametrize("options", COMPACT)
def test_a_state_that_was_saved_goes_on_bit_for_bit(options):
    whole = trained(options, range(12))
    saved = {name: tensor.clone() for name, tensor in trained(options, range(5)).state_dict().items()}
    fresh = state(300, 24, 5, state=options, dead_after_tokens=150)
    fresh.load_state_dict_(saved)
    resumed = trained(options, range(5, 12), fresh)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert int(whole.dead.sum()) > 0  # AuxK had a part


def test_a_state_stored_otherwise_is_refused():
    saved = state(300, 24, 5).state_dict()
    for options, message in ((COMPACT[1], "is it stored as"), (COMPACT[3], "must be torch.bfloat16")):
        with pytest.raises(ValueError, match=message):
            state(300, 24, 5, state=options).load_state_dict_(saved)


def test_a_step_that_is_not_accepted_changes_nothing():
    for options in (COMPACT[0], COMPACT[4]):
        sae = trained(options, range(3))
        before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
        sae.step(batch_of(40, 24, 9), lr=1e-3, variance=2.0, accept=lambda _: False)
        sae.step(torch.full((40, 24), torch.nan), lr=1e-3, variance=2.0)
        for name, tensor in sae.state_dict().items():
            assert torch.equal(tensor, before[name]), name
