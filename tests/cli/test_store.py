"""Activations made elsewhere: import, look, train, verify, copy, as a person types it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.shards.imports import ImportConfig, import_store
from sae_dist.shards.imports.unit_plan import ImportPlan


@pytest.fixture
def store(tmp_path, monkeypatch, capsys):
    """Rows that are sums of 2 of 32 directions, as a store made from an .npy file."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((32, 16)).astype(np.float32)
    chosen = np.argsort(rng.random((4000, 32)), axis=1)[:, :2]
    np.save("acts.npy", ((1 + rng.random((4000, 2, 1))) * directions[chosen]).sum(1).astype(np.float32))
    assert main(["store", "import", "path=acts.npy", "store=stores/mine", "heldout_fraction=0.25"]) == 0
    assert "4,000 rows" in capsys.readouterr().out
    return tmp_path / "stores" / "mine"


@pytest.mark.parametrize("variant", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_train_on_activations_made_elsewhere(store, capsys, variant):
    command = ["train", "store=stores/mine", f"sae={variant}", "sae.n_latents=64", "sae.k=4", "train.steps=300",
               "train.batch=256", "train.lr=0.003", "wandb.mode=disabled", "out=runs/mine"]  # fmt: skip
    assert main(command) == 0
    assert "FVU" in capsys.readouterr().out
    summary = json.loads((store.parents[1] / "runs" / "mine" / "summary.json").read_text())
    assert summary["eval"]["fvu"] < 0.3
    assert summary["eval"]["l0"] == pytest.approx(4, rel=0.05)
    assert summary["eval"]["loss_recovered"] is None
    assert summary["eval"]["tokens"] == 1000  # a quarter, as asked
    assert summary["tokens_trained"] == 300 * 256
    lines = map(json.loads, (store.parents[1] / "runs" / "mine" / "metrics.jsonl").read_text().splitlines())
    *_, last = (line["shuffle_inflation"] for line in lines if "phase" not in line)
    assert last == 1  # every imported row is a document of its own
    assert main(["evaluate", "runs/mine"]) == 0
    assert main(["status", "runs/mine"]) == 0
    assert "done" in capsys.readouterr().out
    assert main(["pages", "runs/mine"]) == 2
    assert "has no text and no model" in capsys.readouterr().err


def test_rows_that_are_all_the_same_are_refused(store, capsys):
    np.save("same.npy", np.full((400, 8), 0.7, np.float32))
    assert main(["store", "import", "path=same.npy", "store=stores/same", "unit_rows=100"]) == 0
    train = ["train", "store=stores/same", "sae.n_latents=16", "sae.k=2", "train.steps=5", "train.batch=32",
             "wandb.mode=disabled", "out=runs/same"]  # fmt: skip
    assert main(train) == 2
    assert "rows are all the same, so that there is nothing to learn" in capsys.readouterr().err


def test_training_follows_a_store_that_is_being_filled(store, capsys):
    rows = np.load("acts.npy")
    plan = ImportPlan(4000, unit_rows=200, heldout_fraction=0.05, seed=0)
    rows[plan.ranges(plan.units - 1)[0][0]] = np.nan  # the last unit, which is held out, is refused at first
    np.save("acts.npy", rows)
    filling = ["store", "import", "path=acts.npy", "store=stores/growing", "unit_rows=200"]
    assert main([*filling, "max_nonfinite=0"]) == 2
    late = sorted((store.parent / "growing" / "commit").glob("*.json"))[6:]
    away = [path.rename(path.with_suffix(".away")) for path in late]

    def fill() -> None:
        for path in away:
            time.sleep(0.1)
            path.rename(path.with_suffix(".json"))
        time.sleep(1)
        import_store(storage.open("stores/growing"), ImportConfig(path="acts.npy", unit_rows=200))

    train = ["train", "store=stores/growing", "sae.n_latents=64", "sae.k=4", "train.steps=60", "train.batch=128",
             "train.init_rows=256", "order.round_units=2", "wandb.mode=disabled"]  # fmt: skip
    assert main([*train, "out=runs/refused"]) == 2
    assert "lacks" in capsys.readouterr().err
    with ThreadPoolExecutor(1) as pool:
        filled = pool.submit(fill)
        assert main([*train, "live=true", "out=runs/live"]) == 0
        filled.result()
    assert main([*train, "out=runs/after"]) == 0
    live, after = (Path("runs", name, "dictionary", "dictionary.safetensors") for name in ("live", "after"))
    assert live.read_bytes() == after.read_bytes()
    summaries = [json.loads(Path("runs", name, "summary.json").read_text()) for name in ("live", "after")]
    assert summaries[0]["eval"] == summaries[1]["eval"] and summaries[0]["eval"]["tokens"] == 199


def test_a_flipped_bit_is_found_named_and_mended(store, capsys):
    assert main(["store", "verify", "store=stores/mine"]) == 0
    assert "every byte is what was committed" in capsys.readouterr().out
    shard = sorted(store.glob("data/*/00000002/*.arrow"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert main(["store", "verify", "stores/mine"]) == 2
    assert "unit 2:" in capsys.readouterr().out
    assert main(["train", "store=stores/mine", "sae.n_latents=64", "sae.k=4", "train.steps=500", "out=runs/bad"]) == 2
    assert "unit" in capsys.readouterr().err
    assert main(["store", "verify", "stores/mine", "withdraw=true"]) == 2
    assert main(["store", "import", "path=acts.npy", "store=stores/mine", "heldout_fraction=0.25"]) == 0
    assert main(["store", "verify", "stores/mine"]) == 0


def test_copies_are_the_same_store(store, capsys):
    assert main(["store", "copy", "store=stores/mine", "to=stores/copy"]) == 0
    assert main(["store", "verify", "stores/copy"]) == 0
    capsys.readouterr()
    listed = []
    for name in ("mine", "copy"):
        assert main(["store", "ls", f"stores/{name}"]) == 0
        listed.append(capsys.readouterr().out.splitlines()[1:])
    assert listed[0] == listed[1]
    assert main(["store", "stats", "stores/copy"]) == 0
    assert main(["store", "gc", "stores/copy", "age_hours=0"]) == 0
    assert "0 objects" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["store", "import", "store=s"], "path is missing"),
        (["store", "copy", "store=stores/mine"], "to is missing"),
        (["store", "import", "path=nothing.npy", "store=s"], "nothing.npy"),
        (
            ["store", "import", "path=nothing.npy", "store=s", "hook='../../x'"],
            "hook='../../x' cannot be part of a key",
        ),
        (["store", "import", "path=nothing.npy", "store=s", "hook=''"], "hook='' cannot be part of a key"),
        (["store", "import", "path=x.npy", "store=s", "dtype=bf16"], "dtype='bf16': give 'bfloat16'"),
        (["store", "frob", "store=s"], "action='frob'"),
        (["store", "ls", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_twins_are_trained_in_the_same_pass_and_compared(store, capsys):
    command = ["train", "store=stores/mine", "sae.n_latents=64", "sae.k=4", "train.steps=300", "train.batch=256",
               "train.lr=0.003", "wandb.mode=disabled", "out=runs/mine"]  # fmt: skip
    assert main([*command, "twins=[seed,frozen_decoder,untrained]"]) == 0
    summary = json.loads((store.parents[1] / "runs" / "mine" / "summary.json").read_text())
    twins = summary["twins"]
    assert twins["seed"]["shared"] > 0.3 > twins["frozen_decoder"]["shared"] + twins["untrained"]["shared"]
    assert twins["untrained"]["gaps"]["fvu"] < twins["frozen_decoder"]["gaps"]["fvu"] < 0
    assert main([*command, "twins=[cousin]"]) == 2
    assert "twins" in capsys.readouterr().err
