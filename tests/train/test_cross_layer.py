"""A cross-layer transcoder: latents of layer l read hook point l alone, and write the l-th target and all after it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from sae_dist import storage
from sae_dist.sae import dictionary
from sae_dist.sae.config import BatchTopK
from sae_dist.shards import stores
from sae_dist.shards.hooks import Hooks
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import MAIN, Member
from sae_dist.train.task import Task
from tests.train.stops import train_with_stops
from tests.train.test_crosscoder import HOOKS, UNITS, full_store, rows_of, train
from tests.train.test_loop import CONFIG, ORDER

READS, WRITES = ("resid_post.3", "resid_post.10"), ("mlp_out.3", "resid_post.10")
CROSS = ("target_hook=[mlp_out.3,resid_post.10]", "train.cross_layer=true")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return full_store(tmp_path_factory.mktemp("store"))


def check_blocks(found: dictionary.Dictionary) -> None:
    """The first half of the latents reads the first hook point and writes both; the second half the last."""
    W_enc, W_dec, *_ = found.parameters
    half, read, written = found.n_latents // 2, HOOKS[READS[0]], HOOKS[WRITES[0]]
    assert not W_enc[read:, :half].any() and not W_enc[:read, half:].any() and not W_dec[half:, :written].any()
    assert bool(W_enc[:read, :half].any(0).all() and W_enc[read:, half:].any(0).all() and W_dec[:half].any(1).all())
    assert bool(W_dec[half:, written:].any(1).all())


def test_it_learns_within_its_blocks_whatever_the_kind_and_the_format_of_its_state(store, tmp_path):
    others = "{kind: gated, name: gated}, {parameters: bfloat16_stochastic, name: small}"
    others += ", {moments: int8, name: coded}"
    more = (f"more_dictionaries=[{others}]", "sae.dead_after_tokens=600", "train.resample_after=[20]")
    assert train(store, tmp_path / "run", *CROSS, *more) == 0
    summary, held_out = json.loads((tmp_path / "run" / "summary.json").read_text()), rows_of(UNITS - 1)
    x, target = (torch.cat([held_out[hook] for hook in hooks], 1) for hooks in (READS, WRITES))
    assert [site["hook"] for site in summary["target_sites"]] == list(WRITES)
    for one in [summary, *summary["also"]]:
        learned = dictionary.load(Path(one["dictionary"]))
        assert learned.info["cross_layer"] is True and list(one["eval"]["fvu_by_hook"]) == list(WRITES)
        check_blocks(learned)
        assert one["eval"]["fvu"] < 0.95
        left = (target - learned.reconstruct(x)).split([HOOKS[hook] for hook in WRITES], 1)
        true = (held_out[hook] - held_out[hook].mean(0) for hook in WRITES)
        fvu = [float(a.square().sum() / b.square().sum()) for a, b in zip(left, true, strict=True)]
        assert fvu == pytest.approx(list(one["eval"]["fvu_by_hook"].values()), rel=1e-3)


def test_stopped_and_repeated_it_ends_in_the_same_dictionary(store, tmp_path):
    def weights(out: Path, *stops: int, config: TrainConfig = CONFIG, start_from: str | None = None) -> bytes:
        sae = BatchTopK(n_latents=96, k=4, dead_after_tokens=1000)
        member = Member(MAIN, sae, 0, config.lr, transcodes=True, skip=True, cross_layer=True, start_from=start_from)
        task = Task(
            stores.open(storage.open(str(store))), Hooks(READS, WRITES), config=config, order=ORDER, seed=0, out=out,
            members=[member],
        )  # fmt: skip
        train_with_stops(task, *stops)
        return (out / "dictionary" / "dictionary.safetensors").read_bytes()

    assert weights(tmp_path / "parts", 3, 30) == weights(tmp_path / "whole")
    still = dataclasses.replace(CONFIG, steps=1, lr=1e-12)  # begins from it, and learns nothing
    there = load(weights(tmp_path / "whole"))
    here = load(weights(tmp_path / "still", config=still, start_from=str(tmp_path / "whole")))
    del there["threshold"], here["threshold"]  # that of one batch
    torch.testing.assert_close(here, there, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["target_hook=mlp_out.3"], "2 hook points that are read and 1 that are rebuilt; give hook and target_hook as"),
        (["hook=resid_post.3", "target_hook=null"], "1 hook points that are read and 1 that are rebuilt"),
        (["sae.n_latents=1", "sae.k=1"], "sae.n_latents=1 for 2 layers of train.cross_layer=true"),
        (["train.moments=factored"], "train.moments=factored with train.cross_layer=true"),
    ],
)
def test_what_has_no_layers_is_refused(store, tmp_path, capsys, keys, message):
    assert train(store, tmp_path / "run", *CROSS, *keys) == 2
    assert message in " ".join(capsys.readouterr().err.split())
