"""How many rows a dictionary begins from, and that those of a larger one in the same pass change nothing."""

import dataclasses

import pytest

from sae_dist.sae.config import TopK
from sae_dist.train import config as settings
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import MAIN, Member
from tests.train.test_loop import CONFIG, full_store, train


@pytest.mark.parametrize(
    ("n_latents", "stored", "rows", "weight"),
    [
        (1_000, 10**6, 16_384, 0.8), (8_192, 10**6, 16_384, 0.8), (16_384, 10**6, 32_768, 0.8),
        (40_000, 10**6, 65_536, 0.8), (65_537, 10**6, 65_536, 0.0),  # more latents than rows: at random
        (16_384, 20_000, 20_000, 0.8), (32_768, 20_000, 20_000, 0.0), (16_384, 5_000, 16_384, 0.8),
    ],
)  # fmt: skip
def test_two_rows_for_each_latent_as_far_as_there_are_so_many(n_latents, stored, rows, weight):
    config = TrainConfig()
    assert config.rows_to_begin(n_latents, stored=stored) == rows
    assert config.data_weight(n_latents=n_latents, rows=rows) == weight
    assert TrainConfig(init_rows=300).rows_to_begin(n_latents, stored=stored) == 300


def test_a_larger_dictionary_in_the_same_pass_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "INIT_ROWS", 64)
    store, config = full_store(tmp_path / "store"), dataclasses.replace(CONFIG, init_rows=None, steps=3)
    small, large = Member(MAIN, TopK(n_latents=48, k=4), 0), Member("large", TopK(n_latents=256, k=4), 0)
    found = []
    for name, members in (("alone", [small]), ("together", [small, large])):
        train(store, tmp_path / name, config=config, members=members)
        found.append((small.folder(tmp_path / name) / "dictionary.safetensors").read_bytes())
    assert found[0] == found[1]
