"""A world whose features are known, learned with the default rate, schedule and initialisation."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.truth import Found, judge
from benchmarks.worlds import world
from sae_dist import storage
from sae_dist.sae import dictionary
from sae_dist.sae.config import BatchTopK, Matryoshka, TopK
from sae_dist.shards import imports, stores
from sae_dist.shards.imports import ImportConfig
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import MAIN, Member, folder
from tests.train.test_loop import train

SIZES = {"n_latents": 512, "k": 4, "dead_after_tokens": 200_000}
TOPK = TopK(**SIZES)
MEMBERS = (
    Member(MAIN, TOPK, 0),
    Member("batchtopk", BatchTopK(**SIZES), 0),
    Member("matryoshka", Matryoshka(**SIZES), 0),
    Member("frozen", TOPK, 1, frozen="decoder"),
    Member("untrained", TOPK, 1, frozen="all"),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Found]:
    place, known = tmp_path_factory.mktemp("planted"), world("independent")
    np.save(place / "rows.npy", known.rows(200_000, seed=100).x.numpy())
    imports.import_store(storage.open(str(place / "store")), ImportConfig(path=str(place / "rows.npy"), hook="x"))
    config = TrainConfig(steps=1000, batch=512, checkpoint_every=1000, threads=1)
    train(stores.open(storage.open(str(place / "store"))), place / "run", members=MEMBERS, config=config)
    heldout = known.rows(8192, seed=1)
    return {m.name: judge(dictionary.load(folder(Path(place / "run"), m.name)), known, heldout) for m in MEMBERS}


@pytest.mark.slow
def test_topk_finds_every_feature_and_twins_that_cannot_learn_find_none(found):
    assert found[MAIN].recovered >= 0.99 and found[MAIN].mmcs >= 0.99 and found[MAIN].fvu <= 0.17
    for twin in ("frozen", "untrained"):
        assert found[twin].recovered == 0 and found[twin].fvu > 2 * found[MAIN].fvu, twin


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_kinds_that_choose_over_a_batch_find_nearly_as_many(found, kind):
    assert found[kind].recovered >= 0.9 and found[kind].fvu <= 0.2
