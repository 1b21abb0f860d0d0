"""A crosscoder as a user trains it: hook= is a list, and every dictionary reads and rebuilds all of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.plan.workload import Workload
from sae_dist.sae import dictionary
from sae_dist.sae.config import KINDS, TopK
from sae_dist.shards import stores
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.writer import create, write_unit
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import MAIN, Member, folder
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.state import RowSource, initial_state
from sae_dist.train.task import Task
from tests.train.stops import train_with_stops
from tests.train.test_loop import CONFIG, ORDER

HOOKS = {"resid_post.10": 16, "resid_post.3": 16, "mlp_out.3": 12}
SITES = [{"hook": "resid_post.3", "width": 16}, {"hook": "resid_post.10", "width": 16}]
ROWS, UNITS, N_TRUE = 600, 6, 48


def rows_of(unit: int) -> dict[str, torch.Tensor]:
    """The same sparse features at every hook point; the first is a thousand times as large, all are off the origin."""
    fixed, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(unit)
    chosen = torch.rand(ROWS, N_TRUE, generator=own).topk(3).indices
    strength = torch.zeros(ROWS, N_TRUE).scatter_(1, chosen, 1 + torch.rand(ROWS, 3, generator=own))
    found = {}
    for (hook, width), size in zip(HOOKS.items(), (300.0, 0.3, 1.0), strict=True):
        directions = torch.nn.functional.normalize(torch.randn(N_TRUE, width, generator=fixed), dim=-1)
        found[hook] = size * (2 + strength @ directions)
    return found


def full_store(place: Path) -> Path:
    meta = StoreMeta(
        model="made", hooks=HOOKS, n_units=UNITS, heldout_units=1, unit_rows=ROWS, slice_rows=128, dtype="float32"
    )
    made, ids = create(storage.open(str(place)), meta), torch.arange(ROWS)
    for unit in range(UNITS):
        write_unit(made, unit, rows_of(unit), doc=ids, pos=ids, token=ids)
    return place


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return full_store(tmp_path_factory.mktemp("store"))


def train(store: Path, out: Path, *more: str) -> int:
    keys = ["hook=[resid_post.3,resid_post.10]", "sae.n_latents=96", "sae.k=4", "train.batch=64", "train.steps=60",
            "train.init_rows=512", "train.checkpoint_every=1000", "train.lr=2e-2", "wandb.mode=disabled",
            "order.lanes=2", "train.threads=1"]  # fmt: skip
    return main(["train", f"store={store}", *keys, *more, f"out={out}"])


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    """One pass of every kind; TopK is the main one."""
    out = tmp_path_factory.mktemp("run") / "out"
    others = ", ".join(f"{{kind: {kind}, name: {kind}}}" for kind in KINDS if kind != "topk")
    assert train(store, out, f"more_dictionaries=[{others}]") == 0
    return out


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_every_kind_rebuilds_all_hook_points_whatever_their_norms(run):
    summary, held_out = read(run), rows_of(UNITS - 1)
    x = torch.cat([held_out[site["hook"]] for site in SITES], 1)
    said = {"hook": "resid_post.3+resid_post.10", "d_model": 32, "sites": SITES}
    assert {key: summary[key] for key in said} == said
    for one in [summary, *summary["also"]]:
        learned, figures = dictionary.load(Path(one["dictionary"])), one["eval"]
        assert learned.sizes == (96, 32, 32) and {key: learned.info[key] for key in said} == said
        left = x - learned.decode(learned.encode(x))
        by_hook = {
            site["hook"]: float(part.square().sum() / (true - true.mean(0)).square().sum())
            for site, part, true in zip(SITES, left.split(16, 1), x.split(16, 1), strict=True)
        }
        assert by_hook == pytest.approx(figures["fvu_by_hook"], rel=1e-3)
        assert figures["fvu"] == pytest.approx(sum(by_hook.values()) / 2, rel=1e-3)
        assert max(by_hook.values()) < 0.95, (learned.info["variant"], by_hook)
        spread = max(by_hook.values()) - min(by_hook.values())
        assert spread < 0.2, (learned.info["variant"], by_hook)  # unscaled, the small one would stay near 1
    assert len(summary["also"]) == len(KINDS) - 1


@pytest.mark.slow
def test_evaluate_repeats_the_figures(run):
    before = read(run)["eval"]
    assert main(["evaluate", str(run)]) == 0
    assert read(run)["eval"] == before


def test_stopped_and_repeated_alone_it_is_the_dictionary_of_the_pass_with_others(store, tmp_path):
    def weights(out: Path, *saes: Any, stops: tuple[int, ...] = (), name: str = MAIN) -> bytes:
        members = [Member(MAIN if not i else sae.kind, sae, 0) for i, sae in enumerate(saes)]
        task = Task(
            stores.open(storage.open(str(store))), Hooks(("resid_post.3", "resid_post.10")), members=members,
            config=CONFIG, order=ORDER, seed=0, out=out,
        )  # fmt: skip
        train_with_stops(task, *stops)
        return (folder(out, name) / "dictionary.safetensors").read_bytes()

    sizes = {"n_latents": 96, "k": 4, "dead_after_tokens": 1000}
    normed = KINDS["jumprelu_tanh"](**sizes)
    together = weights(tmp_path / "together", TopK(**sizes), normed, name=normed.kind)
    assert weights(tmp_path / "alone", normed, stops=(3, 30)) == together


def test_auxk_takes_as_many_latents_as_the_width_of_one_hook_point_allows():
    member, config = Member(MAIN, TopK(n_latents=96, k=4), 0), TrainConfig(steps=1, batch=4, init_rows=64)
    state = initial_state(
        torch.randn(64, 32), None, [member], config, Mesh.single(), source=RowSource("", "a+b", None),
        sides=({"a": 16, "b": 16},), model="",
    )  # fmt: skip
    assert state.learners[0].sae.k_aux == 8
    assert Workload(sae=TopK(n_latents=16_384), d_model=30 * 576, batch=4096, sites=30).k_aux == 256


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["hook=[resid_post.3,absent]"], "hook=absent of store={store}; choose one of resid_post.10, resid_post.3"),
        (["hook=[resid_post.3,resid_post.3]"], "names a hook point twice; name each once"),
        (["hook=null"], "hook=null of store={store}; choose one of resid_post.10, resid_post.3, mlp_out.3, or a list"),
        (["hook=[resid_post.3,mlp_out.3]", "sae=relu_norm"], "of one width (resid_post.3 16, mlp_out.3 12)"),
    ],
)
def test_what_cannot_be_is_refused(store, tmp_path, capsys, keys, message):
    assert train(store, tmp_path / "run", *keys) == 2
    assert message.format(store=store) in " ".join(capsys.readouterr().err.split())
