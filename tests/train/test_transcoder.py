"""A transcoder as a user trains it: hook= is read, target_hook= is rebuilt, whatever the kind of dictionary."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.sae import dictionary
from sae_dist.sae.config import TopK
from sae_dist.sae.module import DictionaryModule
from sae_dist.shards import stores
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.writer import create, write_unit
from sae_dist.train.members import MAIN, Member
from sae_dist.train.task import Task
from tests.train.stops import train_with_stops
from tests.train.test_loop import CONFIG, ORDER

HOOKS = {"resid_pre.3": 24, "mlp_out.3": 20}
ROWS, UNITS, N_TRUE = 600, 6, 48


def rows_of(unit: int) -> dict[str, torch.Tensor]:
    """Two sides that are made of the same sparse features, far from the origin and of other sizes."""
    fixed, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(unit)
    strength = torch.zeros(ROWS, N_TRUE)
    strength.scatter_(
        1, torch.rand(ROWS, N_TRUE, generator=own).topk(3).indices, 1 + torch.rand(ROWS, 3, generator=own)
    )
    read, written = (
        torch.nn.functional.normalize(torch.randn(N_TRUE, width, generator=fixed), dim=-1) for width in HOOKS.values()
    )
    return {"resid_pre.3": 5 + 3 * strength @ read, "mlp_out.3": 0.1 * strength @ written - 0.4}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("store")
    meta = StoreMeta(
        model="made", hooks=HOOKS, n_units=UNITS, heldout_units=1, unit_rows=ROWS, slice_rows=128, dtype="float32"
    )
    made, ids = create(storage.open(str(place)), meta), torch.arange(ROWS)
    for unit in range(UNITS):
        write_unit(made, unit, rows_of(unit), doc=ids, pos=ids, token=ids)
    return place


def train(store: Path, out: Path, *more: str) -> int:
    keys = ["hook=resid_pre.3", "target_hook=mlp_out.3", "sae.n_latents=96", "sae.k=4", "train.batch=64",
            "train.init_rows=512", "train.checkpoint_every=1000", "train.lr=3e-3", "wandb.mode=disabled",
            "order.lanes=2", "train.threads=1"]  # fmt: skip
    return main(["train", f"store={store}", *keys, *more, f"out={out}"])


def test_any_kind_learns_to_rebuild_another_hook_point(store, tmp_path):
    also = "more_dictionaries=[{kind: batchtopk, name: batchtopk}, {kind: jumprelu, name: jumprelu}]"
    assert train(store, tmp_path / "run", also, "train.steps=80", "train.lr=2e-2") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    said = {key: summary[key] for key in ("hook", "d_model", "target_hook", "d_out")}
    assert said == {"hook": "resid_pre.3", "d_model": 24, "target_hook": "mlp_out.3", "d_out": 20}
    held_out, judged = rows_of(UNITS - 1), [summary, *summary["also"]]
    x, target = held_out["resid_pre.3"], held_out["mlp_out.3"]
    for one in judged:
        learned = dictionary.load(Path(one["dictionary"]))
        assert learned.sizes == (96, 24, 20) and learned.info["subtract_b_dec"] is False
        assert {key: learned.info[key] for key in said} == said
        left = target - learned.decode(learned.encode(x))
        fvu = float(left.square().sum() / (target - target.mean(0)).square().sum())
        assert fvu == pytest.approx(one["eval"]["fvu"], rel=1e-3) and fvu < 0.6, learned.info["variant"]
    assert len(judged) == 3
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["fvu"] == summary["eval"]["fvu"]


def test_a_skip_transcoder_has_a_linear_map_beside_its_latents(store, tmp_path):
    assert train(store, tmp_path / "run", "train.skip=true", "train.steps=80", "train.lr=2e-2") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    learned, held_out = dictionary.load(tmp_path / "run" / "dictionary"), rows_of(UNITS - 1)
    x, target = held_out["resid_pre.3"], held_out["mlp_out.3"]
    assert learned.info["skip"] is True and learned.W_skip is not None and bool(learned.W_skip.any())
    active = learned.encode(x)
    with pytest.raises(ValueError, match="has a skip connection: give `decode` the x"):
        learned.decode(active)

    def fvu(rebuilt: torch.Tensor) -> float:
        return float((target - rebuilt).square().sum() / (target - target.mean(0)).square().sum())

    assert fvu(learned.reconstruct(x)) == pytest.approx(summary["eval"]["fvu"], rel=1e-3)
    assert fvu(learned.decode(active, x)) < 0.6 < fvu(dataclasses.replace(learned, W_skip=None).decode(active))
    module = DictionaryModule(learned)
    torch.testing.assert_close(module(x), learned.reconstruct(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_stopped_and_repeated_it_ends_in_the_same_dictionary(store, tmp_path, skip):
    def weights(out: Path, *stops: int) -> bytes:
        task = Task(
            stores.open(storage.open(str(store))), Hooks(("resid_pre.3",), ("mlp_out.3",)),
            members=(Member(MAIN, TopK(n_latents=96, k=4), 0, transcodes=True, skip=skip),), config=CONFIG,
            order=ORDER, seed=0, out=out,
        )  # fmt: skip
        train_with_stops(task, *stops)
        return (out / "dictionary" / "dictionary.safetensors").read_bytes()

    assert weights(tmp_path / "parts", 3, 30) == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["target_hook=attn_out.3"], "target_hook=attn_out.3 of store={store}; choose one of resid_pre.3, mlp_out.3"),
        (["target_hook=null", "train.skip=true"], "train.skip=true without target_hook"),
        (["target_hook=resid_pre.3"], "target_hook=resid_pre.3 is hook itself; leave it out"),
        (["sae.k=21", "sae.n_latents=64"], "sae.k=21 exceeds d_model=20"),
    ],
)
def test_what_cannot_be_is_refused(store, tmp_path, capsys, keys, message):
    assert train(store, tmp_path / "run", "train.steps=10", *keys) == 2
    assert message.format(store=store) in " ".join(capsys.readouterr().err.split())
