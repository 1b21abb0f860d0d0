"""A training that begins from a dictionary: it goes on where that ended, and what does not fit is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from sae_dist import storage
from sae_dist.config import Stopped, UserError
from sae_dist.sae import dictionary
from sae_dist.sae.config import KINDS, BatchTopK, JumpReLU, ReLU, SAEConfig
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.shards.reader import Store
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import MAIN, Member, members, twin_entries
from tests.shards.conftest import double  # noqa: F401  a fixture
from tests.train.test_loop import CONFIG, D_MODEL, SAE, UNITS, full_store, rows_of, train, weights

LEARNED = TrainConfig(steps=60, batch=64, lr=2e-2, init_rows=256, checkpoint_every=1000, log_every=10, threads=1)
STILL = dataclasses.replace(
    CONFIG, steps=1, lr=1e-12, init_rows=100, log_every=1
)  # other scales, and it learns nothing
RANDOM = dataclasses.replace(STILL, init_data_weight=0.0)  # not at rows of the data, which are as good as trained here
X = torch.cat([rows_of(unit) for unit in range(UNITS)])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return full_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def first(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("first")
    train(store, out, config=LEARNED)
    return out


def made(variant: str, *, norms: torch.Tensor, **info) -> Dictionary:
    """One of another tool, with decoder rows of these norms."""
    draw = torch.Generator().manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(SAE.n_latents, D_MODEL, generator=draw), dim=1)
    threshold = torch.rand(SAE.n_latents, generator=draw) if variant == "jumprelu" else None
    parameters = Parameters(
        W_dec.clone().T, W_dec * norms[:, None], torch.rand(SAE.n_latents, generator=draw), X.mean(0)
    )
    info = {"variant": variant, "n_latents": SAE.n_latents, "hook": "x", "model": "made"} | info
    return Dictionary(parameters=parameters, k=4, info=info, threshold=threshold)


def begun(store: Store, out: Path, start_from: Path | str, sae: SAEConfig = SAE, config: TrainConfig = STILL, **more):
    """A training from there, and the lines of its log."""
    member = Member(MAIN, sae, 0, config.lr, start_from=str(start_from), **more)
    return train(store, out, config=config, members=[member])[1]


def fvu(own: Dictionary) -> float:
    return float((X - own.reconstruct(X)).square().sum() / (X - X.mean(0)).square().sum())


def test_it_begins_at_the_fvu_that_the_other_ended_with_and_learns_more(store, first, tmp_path, caplog):
    lines = begun(store, tmp_path, first, config=dataclasses.replace(LEARNED, log_every=1))
    there, here = dictionary.load(first / "dictionary"), dictionary.load(tmp_path / "dictionary")
    (_, line), (_, random) = lines[0], train(store, tmp_path / "random", config=RANDOM)[1][0]
    assert line["fvu"] == pytest.approx(fvu(there), rel=0.1) and random["fvu"] > 1.5 * fvu(there)
    assert fvu(here) < 0.9 * fvu(there) and not caplog.records
    assert here.info["started_from"] == {"dictionary": str(first), "weights": there.info[dictionary.WEIGHTS]}


@pytest.mark.parametrize("variant", ["jumprelu", "topk"])
def test_rows_of_other_norms_get_norm_1_and_the_encoder_makes_up_for_it(store, tmp_path, caplog, variant):
    norms = torch.full((SAE.n_latents,), 3.0) if variant == "topk" else torch.linspace(0.0, 5.0, SAE.n_latents)
    own = made(variant, norms=norms)
    dictionary.save(own, tmp_path / "own")
    begun(store, tmp_path, tmp_path / "own", KINDS[variant](n_latents=SAE.n_latents, k=4, k_aux=0))
    found = dictionary.load(tmp_path / "dictionary")
    torch.testing.assert_close(found.parameters.W_dec.norm(dim=1), torch.ones(SAE.n_latents))
    torch.testing.assert_close(found.reconstruct(X), own.reconstruct(X), rtol=1e-4, atol=1e-4)
    assert not caplog.records


def test_another_kind_takes_the_thresholds_and_what_differs_is_said(store, first, tmp_path, caplog):
    own = made("jumprelu", norms=torch.ones(SAE.n_latents), model="its base", hook="y")
    dictionary.save(own, tmp_path / "own")
    begun(store, tmp_path / "batch", tmp_path / "own", BatchTopK(n_latents=96, k=5))
    assert "it is of y of its base, and learns from x of made" in caplog.text
    assert "it was jumprelu with k=4, and goes on as batchtopk with k=5" in caplog.text
    begun(store, tmp_path / "jump", tmp_path / "batch", JumpReLU(n_latents=96, k=5, k_aux=0))
    there, here = (dictionary.load(tmp_path / name / "dictionary") for name in ("batch", "jump"))
    torch.testing.assert_close(here.reconstruct(X), there.reconstruct(X), rtol=1e-4, atol=1e-4)
    caplog.clear()
    dictionary.save(made("topk", norms=torch.linspace(1.0, 2.0, 96)), tmp_path / "uneven")
    begun(store, tmp_path / "even", tmp_path / "uneven")
    assert "norms up to 2 times as large as others, and get norm 1" in caplog.text


def test_stopped_and_repeated_it_needs_the_dictionary_no_more(store, first, tmp_path):
    there = shutil.copytree(first / "dictionary", tmp_path / "there")
    begun(store, tmp_path / "whole", there, config=CONFIG)
    seen, member = iter(range(1, 1000)), Member(MAIN, SAE, 0, start_from=str(there))
    with pytest.raises(Stopped):
        train(store, tmp_path / "parts", members=[member], stop=lambda: next(seen) == 20)
    shutil.rmtree(there)
    begun(store, tmp_path / "parts", there, config=CONFIG)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    said = [json.loads((tmp_path / name / "dictionary" / "config.json").read_text()) for name in ("parts", "whole")]
    assert said[0]["started_from"] == said[1]["started_from"]


def test_it_begins_from_object_storage_too(store, first, tmp_path, double):  # noqa: F811
    there = storage.open("s3://bucket/runs/first")
    for name in ("config.json", "dictionary.safetensors"):
        there.write(f"dictionary/{name}", (first / "dictionary" / name).read_bytes())
    begun(store, tmp_path / "there", "s3://bucket/runs/first")
    begun(store, tmp_path / "here", first)
    assert weights(tmp_path / "there") == weights(tmp_path / "here")


def test_members_begin_where_the_main_one_does_unless_they_say_otherwise():
    more = [{"k": 8}, {"start_from": "runs/b/"}, {"start_from": None}, *twin_entries(["seed", "untrained"], seed=0)]
    found = members(more, sae=SAE, seed=0, start_from="runs/a")
    assert [member.start_from for member in found] == ["runs/a", "runs/a", "runs/b/", None, None, None]
    assert [member.name for member in found[1:4]] == ["k8", "from-b", "start_fromNone"]


@pytest.mark.parametrize(
    ("sae", "more", "message"),
    [
        (dataclasses.replace(SAE, n_latents=80), {}, "it has 96 latents, not sae.n_latents=80; set sae.n_latents=96"),
        (JumpReLU(n_latents=96, k=4), {}, "sae=jumprelu needs thresholds, which a dictionary of topk does not have"),
        (SAE, {"transcodes": True}, "it rebuilds what it reads (x); take a transcoder, or set target_hook=null"),
        (SAE, {"cross_layer": True}, "it was trained with train.cross_layer=false; set that here too"),
    ],
)
def test_what_does_not_fit_is_refused(store, first, tmp_path, sae, more, message):
    with pytest.raises(UserError) as refused:
        begun(store, tmp_path, first, sae, **more)
    assert f"train.start_from={first}: {message}" in str(refused.value)
    assert not (tmp_path / "dictionary").exists()


def test_thresholds_that_the_kind_does_not_know_and_rows_of_another_width_are_refused(store, tmp_path):
    own = made("jumprelu", norms=torch.ones(96))
    dictionary.save(own, tmp_path / "own")
    with pytest.raises(UserError, match=r"thresholds reach 0\.9\d+, and of sae=relu all are 0"):
        begun(store, tmp_path / "relu", tmp_path / "own", ReLU(n_latents=96, k=4))
    W_enc, W_dec, b_enc, b_dec = own.parameters
    narrow = Parameters(W_enc[:20].clone(), W_dec[:, :20].clone(), b_enc, b_dec[:20].clone())
    dictionary.save(dataclasses.replace(own, parameters=narrow), tmp_path / "narrow")
    with pytest.raises(UserError, match=r"it is for rows of 20 \(x\), not of 24; choose what it is for as hook"):
        begun(store, tmp_path / "wide", tmp_path / "narrow", JumpReLU(n_latents=96, k=4))
    with pytest.raises(ValueError, match=r"train\.init_data_weight=0\.8 is for latents that begin at random"):
        TrainConfig(start_from="runs/a", init_data_weight=0.8)
