"""The Python interface: what scripts and notebooks import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sae_dist
from sae_dist import storage
from sae_dist.api.jobs import overrides
from sae_dist.cli.compose import compose
from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.sae.variants.interface import Sizes
from sae_dist.service.config import RunConfig
from tests.shards.conftest import double  # noqa: F401  a fixture

NOTEBOOK = Path(__file__).parents[2] / "docs/notebook.py"
KEYS = {"sae.n_latents": 32, "sae.k": 4, "train.batch": 128, "train.init_rows": 256}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a store, and a run of each kind of choosing, made through the interface alone."""
    folder = tmp_path_factory.mktemp("interface")
    rows = np.random.default_rng(0).standard_normal((2000, 16), np.float32)
    np.save(folder / "acts.npy", rows)
    assert main(["store", "import", f"path={folder}/acts.npy", f"store={folder}/store", "hook=resid_post.1"]) == 0
    for sae in ("topk", "batchtopk"):
        sae_dist.train(
            KEYS, store=folder / "store", sae=sae, train={"steps": 10}, wandb={"mode": "disabled"}, out=folder / sae
        )
    return folder


def test_importing_the_package_loads_nothing_heavy():
    program = "import sae_dist, sys; dir(sae_dist); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "sae_dist" in loaded and not {"torch", "numpy", "ray", "hydra", "pydantic", "transformers"} & set(loaded)


def test_a_function_that_shares_its_name_with_a_package_is_both():
    program = """
import sae_dist.train.config, sae_dist.sweep.config as module
import sae_dist
assert callable(sae_dist.train) and callable(sae_dist.sweep) and sae_dist.train.config and module
assert set(sae_dist.__all__) <= set(dir(sae_dist))
try:
    sae_dist.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def formula(found, x):
    """The reconstruction as design.md has it."""
    z = (x - found.b_dec) @ found.W_enc + found.b_enc
    if found.threshold is None:
        kept = torch.zeros_like(z).scatter(-1, z.topk(4).indices, z.topk(4).values.relu())
    else:
        kept = torch.where(z > found.threshold, z, 0)
    return kept, kept @ found.W_dec + found.b_dec


@pytest.mark.parametrize("sae", ["topk", "batchtopk"])
def test_a_loaded_dictionary_takes_any_shape_and_says_what_it_is(place, sae):
    found = sae_dist.load(place / sae)
    assert (found.hook, found.target_hook, found.model) == ("resid_post.1", None, "imported")
    assert (found.n_latents, found.k) == (32, 4) and isinstance(found, torch.nn.Module) and sae in repr(found)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    f, (kept, x_hat) = found.encode(x), formula(found, x)
    torch.testing.assert_close(f, kept)
    torch.testing.assert_close(found.decode(f), x_hat)
    torch.testing.assert_close(found(x), x_hat)
    assert found.encode(x[0, 0]).shape == (32,) and found.reconstruct(x[:0]).shape == (0, 3, 16)
    assert sae_dist.load(place / sae / "dictionary").dictionary.sizes == Sizes(32, 16, 16)
    with pytest.raises(UserError, match=r"x \[2, 3, 15\] has no rows of 16"):
        found.encode(x[..., :15])


@pytest.mark.parametrize("sae", ["topk", "batchtopk"])
def test_a_loaded_dictionary_has_the_dtype_it_is_moved_to_and_gives_gradients(place, sae):
    found = sae_dist.load(place / sae)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    exact = sae_dist.load(place / sae).to(torch.float64)
    torch.testing.assert_close(exact.encode(x).float(), found.encode(x))
    assert exact.encode(x).dtype == torch.float64 and exact.reconstruct(x.bfloat16()).dtype == torch.bfloat16
    assert exact.dictionary.parameters.W_dec.dtype == torch.float32  # as its kernels want it
    assert not any(each.requires_grad for each in found.parameters())
    found.requires_grad_()
    found.reconstruct(x).square().sum().backward()
    assert all(found.get_parameter(name).grad.abs().sum() > 0 for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    active = found.dictionary.encode(x)  # pairs
    torch.testing.assert_close(found.dictionary.decode(active), found.reconstruct(x).detach())


def test_the_rows_are_split_where_all_latents_of_all_would_not_fit(place, monkeypatch):
    found, x = sae_dist.load(place / "topk"), torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    whole = found(x)
    monkeypatch.setattr("sae_dist.sae.module.DENSE", 64)  # two rows of 32 latents
    torch.testing.assert_close(found(x), whole)


def test_a_dictionary_on_object_storage_is_loaded(place, double, tmp_path):  # noqa: F811
    there = storage.open("s3://bucket/runs/mine")
    for name in ("config.json", "dictionary.safetensors"):
        there.write(f"dictionary/{name}", (place / "topk" / "dictionary" / name).read_bytes())
    own = sae_dist.load(place / "topk")
    for uri in ("s3://bucket/runs/mine", "s3://bucket/runs/mine/dictionary"):
        found = sae_dist.load(uri)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), own.parameters(), strict=True))
    with pytest.raises(UserError, match="s3://bucket/nothing has no config.json"):
        sae_dist.load("s3://bucket/nothing")
    with pytest.raises(UserError, match=str(tmp_path)):
        sae_dist.load(tmp_path)


def test_a_store_goes_on_where_its_state_says_to_the_end_of_each_epoch(place):
    def store():
        return sae_dist.Store(place / "store", batch=300, seed=3)

    whole = store()
    assert whole.hooks == {"resid_post.1": 16} and whole.model == "imported" and whole.rows >= 1800
    first, second = [list(whole) for _ in range(2)]
    assert [each.step for each in first + second] == list(range(len(first + second)))
    assert abs(len(first) * 300 - whole.rows) < 300 and first[0].x.shape == (300, 16) and first[0].target is first[0].x
    cut = store()
    for found in cut:
        if found.step == 2:
            break
    resumed = store()
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    rest = list(resumed)
    assert [each.step for each in rest] == [each.step for each in first[3:]]
    assert all(torch.equal(a.x, b.x) for a, b in zip(rest, first[3:], strict=True))
    assert rest[-1].order_hash == first[-1].order_hash
    with pytest.raises(UserError, match="this state is of seed=3"):
        sae_dist.Store(place / "store", batch=300).load_state_dict(cut.state_dict())
    loaded = torch.utils.data.DataLoader(store(), batch_size=None)
    assert torch.equal(next(iter(loaded)).x, first[0].x)
    assert sum(len(x) for x, _ in whole.heldout()) == 2000 - whole.rows


def test_ranks_share_every_batch_of_a_store(place):
    ranks = [sae_dist.Store(place / "store", batch=300, rank=rank, world=2) for rank in range(2)]
    parts, whole = [next(iter(rank)) for rank in ranks], next(iter(sae_dist.Store(place / "store", batch=300)))
    assert sorted(map(tuple, torch.cat([part.x for part in parts]).tolist())) == sorted(map(tuple, whole.x.tolist()))


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"hook": "resid_post.2"}, "hook=resid_post.2 is not in .*it has resid_post.1"),
     ({"target_hook": "x"}, "hook=x is not in"), ({"batch": 0}, "batch=0")],
)  # fmt: skip
def test_a_store_that_cannot_be_is_refused(place, keys, said):
    with pytest.raises(UserError, match=said):
        next(iter(sae_dist.Store(place / "store", **keys)))


def test_training_by_call_is_training_by_command(place, tmp_path):
    command = ["train", f"store={place}/store", "sae=topk", "train.steps=10", "wandb.mode=disabled", f"out={tmp_path}"]
    assert main([*command, *(f"{key}={value}" for key, value in KEYS.items())]) == 0
    by_call, by_command = (json.loads((folder / "summary.json").read_text()) for folder in (place / "topk", tmp_path))
    assert by_call["config_hash"] == by_command["config_hash"]
    assert torch.equal(sae_dist.load(tmp_path).W_enc, sae_dist.load(place / "topk").W_enc)
    again = sae_dist.train(
        KEYS, store=place / "store", sae={"kind": "topk"}, train={"steps": 10}, wandb={"mode": "disabled"},
        out=place / "topk",
    )  # fmt: skip
    assert again == by_call  # it had finished


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"sae.latents": 4}, "unknown key sae.latents"), ({"sae": "top"}, "sae=top is not known"),
     ({"sae.n_latents": "many"}, "sae.n_latents='many'"), ({"train": {"steps": 5}, "train.steps": 6}, "given twice")],
)  # fmt: skip
def test_wrong_keys_are_refused_as_on_the_command_line(place, tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        sae_dist.train({"store": place / "store", "out": tmp_path, **keys})


def test_text_is_never_taken_for_grammar(place, tmp_path):
    out = tmp_path / "it's a,b [${x}"
    with pytest.raises(UserError, match="no_such_hook"):
        sae_dist.train(store=place / "store", hook="no_such_hook, {a}'", out=str(out).replace("${x}", "c"))


def test_paths_and_numbers_of_numpy_are_what_they_are_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my corpus.jsonl").write_text('{"text": "a"}\n')
    keys = {"text": Path("my corpus.jsonl"), "out": Path("runs/o'brien"), "train.lr": np.geomspace(1e-4, 1e-3, 3)[1],
            "train.batch": np.int64(256), "tensorboard": np.bool_(True), "seed": np.uint8(3)}  # fmt: skip
    values = compose("run", overrides(keys, {}, config_class=RunConfig))
    assert (values["text"]["kind"], values["text"]["path"]) == ("jsonl", "my corpus.jsonl")
    assert values["out"] == "runs/o'brien" and values["train"]["lr"] == pytest.approx(10**-3.5)
    assert (values["train"]["batch"], values["tensorboard"], values["seed"]) == (256, True, 3)


def test_arrays_of_numpy_are_values_of_a_sweep(place, tmp_path):
    over = {"train.lr": list(np.geomspace(1e-4, 1e-2, 3)), "sae.k": list(np.array([4, -1]))}
    with pytest.raises(UserError, match="sae.k=-1: give 1 or more"):
        sae_dist.sweep("train", store=place / "store", out=tmp_path, over=over)


@pytest.mark.slow
def test_a_sweep_by_call_gives_its_points(place, tmp_path):
    points = sae_dist.sweep(
        "train", {"sae.n_latents": 32, "train.batch": 128}, store=place / "store", out=tmp_path,
        train={"steps": 4, "init_rows": 256}, wandb={"mode": "disabled"},
        over={"sae": ["topk", "batchtopk"], "sae.k": [2, 3]},
    )  # fmt: skip
    assert [point["overrides"] for point in points] == [
        {"sae": sae, "sae.k": k} for sae in ("topk", "batchtopk") for k in (2, 3)
    ]
    assert all(point["state"] == "done" and point["summary"]["eval"]["fvu"] is not None for point in points)
    assert sae_dist.load(tmp_path / "points" / points[0]["id"]).k == 2
    with pytest.raises(UserError, match="pages cannot be swept"):
        sae_dist.sweep("pages", over={"sae.k": [2, 3]})


def test_the_notebook_runs(place):
    done = subprocess.run(
        [sys.executable, NOTEBOOK, place / "topk"], capture_output=True, text=True, check=True, timeout=300
    )
    assert "held-out rows: FVU 0." in done.stdout and "L0 4.0" in done.stdout
