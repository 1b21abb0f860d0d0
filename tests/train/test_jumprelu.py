"""JumpReLU: gradients of the plain loss, a number of active latents near its target, the same result when repeated."""

import dataclasses

import pytest
import torch
from sae_kernels import reference
from sae_kernels.shard import Shard

from sae_dist.config import Stopped, UserError
from sae_dist.sae import dictionary
from sae_dist.sae.config import JumpReLU
from sae_dist.shards.reader import Store
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.step import MeshStep
from tests.sae_kernels.test_shard import BACKENDS, batch_of
from tests.sae_kernels.test_shard import dictionary as tensors
from tests.train.test_loop import CONFIG, ROWS, full_store, rows_of, train, weights

SAE = JumpReLU(n_latents=96, k=4, dead_after_tokens=1000)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return full_store(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, n_latents, d_model, k", [(6, 64, 19, 4), (40, 700, 33, 12)])
@pytest.mark.parametrize("level", [0.1, 1.5])  # the band begins at 0, and above it
def test_gradients_match_autograd_of_the_plain_loss_in_double_precision(backend, batch, n_latents, d_model, k, level):
    sae = JumpReLU(n_latents=n_latents, k=k, k_aux=0, l0_coefficient=0.3, bandwidth=0.8)
    given, theta = tensors(n_latents, d_model), level + 0.5 * torch.rand(n_latents)
    theta[3] = -0.1  # a threshold below 0 lets all that is positive pass
    shard = Shard(
        **given, k=k, k_aux=0, aux_coefficient=0.0, dead_after_tokens=100, vectors={"threshold": theta}, backend=backend
    )
    step, x = MeshStep(shard, Mesh.single(), sae=sae, k_aux=0, width=2), batch_of(batch, d_model)
    statistics = step.forward(x, variance=1.7)
    d_enc, d_dec, d_b_enc, through = shard.stages.row_gradients()
    found = (d_enc.t(), d_dec, d_b_enc, step._d_b_dec(through), step._d_own["threshold"])

    parameters = [p.double().requires_grad_() for p in (*given.values(), theta)]
    W_enc, W_dec, b_enc, b_dec, threshold = parameters
    z = reference.pre_activations(x.double(), W_enc, b_enc, b_dec, product_dtype=torch.bfloat16)
    values, gate = reference.jumprelu(z, threshold, bandwidth=sae.bandwidth)
    squared_error = (x.double() - values @ W_dec - b_dec).square().sum()
    l0 = gate.sum() / batch
    loss = squared_error / (batch * 1.7) + sae.l0_coefficient * (l0 / k - 1).square()
    expected = torch.autograd.grad(loss, parameters)

    assert int(statistics.active) == round(float(gate.detach().sum()))
    torch.testing.assert_close(statistics.squared_error.double(), squared_error.detach(), rtol=1e-5, atol=0)
    assert step.penalty is not None and float(step.penalty.value) == pytest.approx(
        sae.l0_coefficient * (float(l0.detach()) / k - 1) ** 2, rel=1e-6
    )
    for name, ours, theirs in zip((*given, "threshold"), found, expected, strict=True):
        tolerance = 2e-5 * theirs.abs() + 4e-6 * float(theirs.abs().max() + 1e-6)
        assert bool(((ours - theirs).abs() <= tolerance).all()), name
    assert bool((expected[4] != 0).any())


@pytest.mark.slow
def test_it_learns_with_about_as_many_active_latents_as_asked(store, tmp_path):
    config = dataclasses.replace(CONFIG, steps=400, batch=128, lr=3e-3, checkpoint_every=10_000)
    _, lines = train(store, tmp_path, config=config, sae=SAE)
    first, last = lines[0][1], lines[-1][1]
    assert last["fvu"] < 0.5 * first["fvu"] and last["l0"] == pytest.approx(SAE.k, rel=0.25)
    assert last["penalty"] < first["penalty"] + 1
    learned = dictionary.load(tmp_path / "dictionary")
    assert learned.info["variant"] == "jumprelu" and learned.threshold is not None
    assert bool((learned.threshold >= 0).all()) and len(learned.threshold.unique()) > 1
    x = rows_of(0)  # the dictionary on raw rows does what was trained on scaled ones
    active = learned.encode(x)
    assert len(active.values) / ROWS == pytest.approx(last["l0"], rel=0.25)
    left = (x - learned.decode(active)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(left) == pytest.approx(last["fvu"], rel=0.25)


@pytest.mark.parametrize("at", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_and_repeated_it_ends_in_the_same_dictionary(store, tmp_path, at):
    train(store, tmp_path / "whole", sae=SAE)
    done = iter(range(10_000))
    with pytest.raises(Stopped):
        train(store, tmp_path / "parts", sae=SAE, stop=lambda: next(done) >= at)
    train(store, tmp_path / "parts", sae=SAE)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_dictionary_that_is_dense_is_refused_before_it_takes_memory_without_bound():
    sae = JumpReLU(n_latents=1000, k=2, k_aux=0)
    shard = Shard(
        **tensors(1000, 16), k=2, k_aux=0, aux_coefficient=0.0, dead_after_tokens=100,
        vectors={"threshold": torch.full((1000,), -0.5)},
    )  # fmt: skip
    with pytest.raises(UserError, match="far more active latents than the 2 that sae.k asks for"):
        MeshStep(shard, Mesh.single(), sae=sae, k_aux=0).forward(batch_of(64, 16), variance=1.0)
