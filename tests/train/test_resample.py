"""Dead latents begin anew at rows that are badly rebuilt; or begin at data, so that fewer die."""

import dataclasses

import pytest
import torch

from sae_dist.config import Stopped
from sae_dist.sae.config import Gated, JumpReLU, JumpReLUTanh, ReLU, TopK
from sae_dist.sae.initialize import initialize
from sae_dist.sae.variants.interface import spec_of
from sae_dist.shards.reader import Store
from sae_dist.train.config import TrainConfig
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.resample import ENCODER, resample_
from sae_dist.train.parallel.step import MeshStep
from tests.sae_kernels.test_shard import BACKENDS, Shard, batch_of
from tests.sae_kernels.test_shard import dictionary as tensors
from tests.train.test_loop import CONFIG, full_store, train, weights

N, D = 64, 19


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return full_store(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(
    ("asked", "trained", "tokens"),
    [(None, {}, 999_833), (None, {"tokens": 10**9}, 10_000_000), (None, {"steps": 1, "batch": 4}, 1), (700, {}, 700)],
)
def test_a_latent_is_dead_after_a_tenth_of_the_training_unless_it_is_told(asked, trained, tokens):
    assert TrainConfig(**trained).dead_after(TopK(dead_after_tokens=asked)) == tokens  # 2,441 whole batches of 4,096


def test_by_default_latents_die_in_a_short_training_and_the_figures_say_so(store, tmp_path):
    _, lines = train(store, tmp_path, sae=TopK(n_latents=512, k=2))
    assert lines[-1][1]["dead_fraction"] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dead_latent_gets_the_direction_of_a_row_and_forgets_its_moments(backend):
    sae = ReLU(n_latents=N, k=4, k_aux=0, dead_after_tokens=100)
    shard = Shard(
        **tensors(N, D), k=4, k_aux=0, aux_coefficient=0.0, dead_after_tokens=100, backend=backend,
        unit=spec_of(sae, "W_dec").unit,
    )  # fmt: skip
    step, x = MeshStep(shard, Mesh.single(), sae=sae, k_aux=0, resamples=True), batch_of(40, D)
    step.forward(x, variance=1.7, progress=1.0)
    step.update_(lr=1e-3)
    shard.tokens_since_fired[:] = 0
    shard.tokens_since_fired[[3, 50]] = 100
    step.skip_()  # counts the dead again
    before = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    assert resample_(step, x, x, seed=0) == 2 and resample_(step, x, x, seed=0) == 0
    after = step.state_dict()
    rest = torch.tensor([j for j in range(N) if j not in (3, 50)])
    for name in ("W_dec", "b_enc", "first.W_dec", "second.b_enc", "tokens_since_fired"):
        assert torch.equal(after[name][rest], before[name][rest]), name
        assert name == "W_dec" or not after[name][[3, 50]].any(), name
    directions = torch.nn.functional.normalize(x - after["b_dec"], dim=1)
    for latent in (3, 50):
        assert float((directions @ after["W_dec"][latent]).max()) == pytest.approx(1, abs=1e-5)
    norms = after["W_enc"].norm(dim=0)
    assert norms[[3, 50]].tolist() == pytest.approx([ENCODER * float(norms[rest].mean())] * 2, rel=1e-5)
    found = shard.stages.select(shard.stages.rows(x), k=1, latents=torch.tensor([3]))  # by the kernels' own copy
    z = (x - after["b_dec"]) @ after["W_enc"][:, 3]
    torch.testing.assert_close(found.values[:, 0], z.relu(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", [JumpReLU, JumpReLUTanh, Gated])
def test_one_with_a_threshold_is_active_on_the_row_that_it_begins_at(kind):
    sae = kind(n_latents=N, k=4, k_aux=0, dead_after_tokens=100)
    vectors = {name: torch.full((N,), value) for name, value in sae.start(2.0).items() if name != "b_enc"}
    shard = Shard(
        **tensors(N, D), k=4, k_aux=0, aux_coefficient=0.0, dead_after_tokens=100, vectors=vectors,
        unit=spec_of(sae, "W_dec").unit,
    )  # fmt: skip
    shard.vectors["threshold"].fill_(2.0)
    step, x = MeshStep(shard, Mesh.single(), sae=sae, k_aux=0, resamples=True), batch_of(40, D)
    step.forward(x, variance=1.7, progress=1.0)
    step.update_(lr=0.0)
    shard.tokens_since_fired[:] = 0
    shard.tokens_since_fired[[3, 50]] = 100
    step.skip_()
    assert resample_(step, x, x, seed=0) == 2
    assert shard.vectors["threshold"][[3, 50]].tolist() == pytest.approx([ENCODER * 2.0] * 2)
    z = ((x - shard.b_dec) @ shard.W_enc[:, [3, 50]] + shard.b_enc[[3, 50]]).amax(0)
    assert (z > shard.vectors["threshold"][[3, 50]]).all() and (z < 2.0).all()  # that of the living is too high for it


@pytest.mark.slow
def test_it_revives_and_a_run_that_is_stopped_and_repeated_resamples_the_same(store, tmp_path):
    sae = ReLU(n_latents=256, k=2, l1_coefficient=6.0, k_aux=0, dead_after_tokens=1000)
    longer = dataclasses.replace(CONFIG, steps=200, batch=128, lr=3e-3, init_data_weight=0.0)
    _, lines = train(store, tmp_path / "none", sae=sae, config=longer)
    config = dataclasses.replace(longer, resample_after=(60, 120))
    _, revived = train(store, tmp_path / "whole", sae=sae, config=config)
    without, dead = ({step: line["dead_fraction"] for step, line in of} for of in (lines, revived))
    assert dead[50] == without[50] > 0.2
    assert dead[60] == 0 and dead[70] < 0.5 * without[70]  # 10 steps are longer than a latent may be silent
    done = iter(range(10_000))
    with pytest.raises(Stopped):
        train(store, tmp_path / "parts", sae=sae, config=config, stop=lambda: next(done) >= 99)
    train(store, tmp_path / "parts", sae=sae, config=config)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_rows_begin_at_data_as_much_as_asked_and_the_same_in_parts():
    x = 3 + torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    whole, half = (initialize(x, n_latents=3000, k=4, seed=1, data_weight=w).parameters for w in (1.0, 0.5))
    directions = torch.nn.functional.normalize(x - whole.b_dec, dim=1)
    nearest = (whole.W_dec @ directions.T).max(1)
    assert float(nearest.values.min()) > 1 - 1e-5 and len(nearest.indices.unique()) == 200
    assert 0.6 < float((half.W_dec @ directions.T)[torch.arange(3000), nearest.indices].mean()) < 0.8  # about 1/sqrt(2)
    assert nearest.indices.bincount().tolist() == [15] * 200  # 3,000 latents, 200 rows: each serves as often
    part = initialize(x, n_latents=3000, k=4, seed=1, data_weight=0.5, latents=range(900, 2100)).parameters
    assert torch.equal(part.W_dec, half.W_dec[900:2100])


def test_latents_begin_at_rows_of_data_that_are_least_alike():
    """Of 400 rows 100 are nearly the same one; 100 latents begin at 200 rows by chance, some 150 of them distinct."""
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(0))
    x[100:200] = x[100] + 1e-3 * x[100:200]
    W_dec = initialize(x, n_latents=100, k=4, seed=1, data_weight=1.0).parameters.W_dec
    alike = (W_dec @ W_dec.T).fill_diagonal_(0)
    assert float(alike.max()) < 0.99
    by_chance = x[torch.randperm(400, generator=torch.Generator().manual_seed(2))[:100]] - x.median(0).values
    by_chance = torch.nn.functional.normalize(by_chance, dim=1)
    assert int(((by_chance @ by_chance.T).fill_diagonal_(0).amax(1) > 0.99).sum()) > 10
