"""Every kind of dictionary, from a real store: it learns, it resumes, and it is the same alone and among others."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sae_dist.config import Stopped
from sae_dist.formats.folded import fold
from sae_dist.sae import dictionary
from sae_dist.sae.config import KINDS
from sae_dist.sae.variants.interface import tracks_threshold
from sae_dist.shards.reader import Store
from sae_dist.train.members import MAIN, Member, folder
from tests.train.test_loop import CONFIG, UNITS, full_store, rows_of, train, weights

CHOSEN = {"matryoshka": {"random_prefixes": True, "prefixes": (0.25, 0.5, 1.0)}, "topk": {"k_start": 12}}
SAES = {kind: KINDS[kind](n_latents=96, k=4, dead_after_tokens=1000, **CHOSEN.get(kind, {})) for kind in KINDS}
OTHERS = [kind for kind in KINDS if kind != "topk"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return full_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def together(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("together")
    members = (Member(MAIN, SAES["topk"], 0, None), *(Member(kind, SAES[kind], 0, None) for kind in OTHERS))
    train(store, out, members=members)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_repeated_alone_it_is_the_dictionary_of_the_pass_with_all_others(store, together, tmp_path, kind):
    done = iter(range(10_000))
    with pytest.raises(Stopped):
        train(store, tmp_path, sae=SAES[kind], stop=lambda: next(done) >= 29)
    train(store, tmp_path, sae=SAES[kind])
    name = MAIN if kind == "topk" else kind
    assert weights(tmp_path) == (folder(together, name) / "dictionary.safetensors").read_bytes()


@pytest.mark.parametrize("kind", OTHERS)
def test_a_finished_one_does_on_raw_rows_what_was_trained_on_scaled_ones(together, kind):
    learned, x = dictionary.load(together / "dictionaries" / kind), torch.cat([rows_of(unit) for unit in range(UNITS)])
    active = learned.encode(x)
    left = (x - learned.decode(active)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(left) < 0.9 and 0 < len(active.values) / len(x) < 12  # 60 steps from about 0.75 and 4
    assert learned.signed == bool((active.values < 0).any()) == (kind == "abs_topk")


@pytest.mark.parametrize("kind", ["relu", "relu_norm", "p_anneal"])
def test_one_without_thresholds_is_exported_as_a_relu(together, kind):
    assert fold(dictionary.load(together / "dictionaries" / kind)).is_relu


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_an_untrained_twin_has_as_many_active_latents_as_were_chosen_in_its_pass(store, tmp_path, kind):
    sae = dataclasses.replace(SAES[kind], rows_fraction=0.0)
    train(store, tmp_path, members=(Member(MAIN, sae, 0), Member("untrained", sae, 1, frozen="all")))
    rows = rows_of(UNITS - 1)
    active = dictionary.load(folder(tmp_path, "untrained")).encode(rows)
    assert 2 < len(active.values) / len(rows) < 8  # of 96; k is 4, and the threshold is of batches of 64


@pytest.fixture(scope="module")
def again(store, together, tmp_path_factory) -> Path:
    """A pass that begins from all of them, with other scales, and learns nothing."""
    out, config = tmp_path_factory.mktemp("again"), dataclasses.replace(CONFIG, steps=1, lr=1e-12, init_rows=100)
    names = {kind: MAIN if kind == "topk" else kind for kind in KINDS}
    members = (
        Member(names[kind], sae, 1, config.lr, start_from=str(folder(together, names[kind])))
        for kind, sae in SAES.items()
    )
    train(store, out, config=config, members=tuple(members))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_begins_from_it_begins_with_its_weights(together, again, kind):
    there, here = (dictionary.load(folder(out, MAIN if kind == "topk" else kind)) for out in (together, again))
    for name, tensor in (there.parameters._asdict() | there.more).items():
        if name != "threshold" or not tracks_threshold(SAES[kind]):  # of the first batch, not learned
            torch.testing.assert_close((here.parameters._asdict() | here.more)[name], tensor, rtol=2e-6, atol=1e-7)
