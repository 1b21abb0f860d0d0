"""A training with all that tracks it, as a command: what W&B and TensorBoard have of it, and `sync`."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sae_dist.cli.main import main
from sae_dist.monitor.metrics import read_metrics
from sae_dist.monitor.panels import EDGES, OWN
from tests.monitor.event_files import events, scalars
from tests.monitor.tracking import command, figures, runs
from tests.train.test_loop import rows_of

PANELS = {
    "fvu", "l0", "dead_fraction", "dense_fraction", "density_histogram/values", "lr", "gradient_norm", "encoder_norm",
    "decoder_norm", "b_enc_norm", "b_dec_norm", "x_norm", "tokens", "tokens_per_second", "starved_fraction",
    "blocked_fraction", "skipped_steps",
}  # fmt: skip
SECRET = "http://127.0.0.1:9/secret"


@pytest.fixture(scope="module")
def tracked(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tracked"
    keys = ["wandb.mode=offline", "wandb.group=mine", "tensorboard=true", f"alerts.webhook={SECRET}"]
    assert main(command(store, out, *keys)) == 0
    return out


def test_wandb_has_one_run_a_dictionary_with_every_panel(tracked):
    found = runs(tracked)
    assert {name: (run.job_type, run.group) for name, run in found.items()} == {
        "tracked": ("train", "mine"), "tracked-wide": ("train", "mine"),
        "tracked-evaluate": ("evaluate", "mine"), "tracked-wide-evaluate": ("evaluate", "mine"),
    }  # fmt: skip
    lines = read_metrics(tracked / "metrics.jsonl")
    for name, prefix in (("tracked", ""), ("tracked-wide", "wide/")):
        run = found[name]
        assert run.history[-1].keys() >= PANELS, PANELS - run.history[-1].keys()
        assert [(each["_step"], each["fvu"]) for each in run.history] == [(e["step"], e[f"{prefix}fvu"]) for e in lines]
        assert run.history[0]["density_histogram/bins"] == list(EDGES)
        assert run.summary["eval/fvu"] > 0
        assert not [key for key in run.history[-1] if key.startswith("wide/")]
    assert found["tracked-wide"].config["sae"]["n_latents"] == 160 and found["tracked"].config["sae"]["n_latents"] == 97
    assert found["tracked-evaluate"].history[0]["tokens_trained"] == 60 * 64
    assert len({run.id for run in found.values()}) == 4


def test_dictionaries_and_the_manifest_are_artifacts_by_reference(tracked):
    summary = json.loads((tracked / "summary.json").read_text())
    found = runs(tracked)
    entries = [entry for artifact in found["tracked"].artifacts for entry in artifact.manifest.contents]
    weights = json.loads((Path(summary["dictionary"]) / "config.json").read_text())["weights_xxh3_128"]
    assert {entry.ref.rpartition("/")[2] for entry in entries} == {"dictionary.safetensors", "v000001.json"}
    assert all(entry.ref.startswith("file:///") and not entry.local_path for entry in entries)
    assert weights in {entry.digest for entry in entries}
    (wide,) = found["tracked-wide"].artifacts
    assert wide.type == "dictionary"


def test_the_figures_are_those_of_the_dictionary(tracked):
    last = read_metrics(tracked / "metrics.jsonl")[-1]
    assert last["decoder_norm"] == pytest.approx(1) and last["wide/decoder_norm"] == pytest.approx(1)
    rows = torch.cat([rows_of(unit) for unit in range(8)])
    assert last["x_norm"] == pytest.approx(float(rows.norm(dim=1).mean()), rel=0.05)
    assert sum(last["density_histogram"]) + round(97 * last["silent_fraction"]) == 97
    middles = 10 ** (np.array(EDGES)[:-1] + 0.125)
    assert np.dot(last["density_histogram"], middles) == pytest.approx(last["l0"], rel=0.2)
    assert 0 < last["gradient_norm"] < 10 and 0 <= last["dense_fraction"] < 0.5
    assert last["gpu_memory_gb"] is None or last["gpu_memory_gb"] > 0


def test_every_figure_of_a_dictionary_is_declared_as_one(tracked):
    """An undeclared one would be shown in the runs of all dictionaries."""
    last = read_metrics(tracked / "metrics.jsonl")[-1]
    assert {key.removeprefix("wide/") for key in last if key.startswith("wide/")} <= OWN
    assert {"threshold", "widened_rows"} <= OWN & last.keys()


def test_tensorboard_has_a_folder_a_dictionary_and_leaves_out_what_was_there(store, tracked):
    (path,) = (tracked / "tensorboard" / "tracked-wide").iterdir()
    lines = read_metrics(tracked / "metrics.jsonl")
    assert scalars(path, "fvu") == [(line["step"], pytest.approx(line["wide/fvu"])) for line in lines]
    written = events(path)
    assert written[0].file_version == "brain.Event:2" and written[1].session_log.status == 1  # START, from step 0
    histograms = [value.histo for event in written for value in event.summary.value if value.HasField("histo")]
    assert [*histograms[-1].bucket] == [0, *lines[-1]["wide/density_histogram"]]
    assert scalars(next((tracked / "tensorboard" / "tracked-evaluate").iterdir()), "fvu")


def test_sync_makes_the_same_history_anew(tracked, tmp_path, capsys):
    before = runs(tracked)
    moved = tmp_path / "moved"  # a run keeps its identities wherever its folder is
    shutil.copytree(tracked, moved)
    shutil.rmtree(moved / "wandb")
    assert main(["sync", str(moved)]) == 0
    said, after = capsys.readouterr().out, runs(moved)
    assert after.keys() == before.keys()
    for name, run in after.items():
        then = before[name]
        assert (run.id, run.group, run.job_type) == (then.id, then.group, then.job_type)
        assert [figures(each) for each in run.history] == [figures(each) for each in then.history]
        assert [each["_timestamp"] for each in run.history] == [each["_timestamp"] for each in then.history]
        assert figures(run.summary) == figures(then.summary)
        assert {k: v for k, v in run.config.items() if k != "_wandb"} == {
            k: v for k, v in then.config.items() if k != "_wandb"
        }
        assert f"{run.job_type:<9} {run.id}  {name}" in said
    assert said.count("/wandb/offline-run-") == 4


def test_the_webhooks_address_is_in_no_file_of_the_run(tracked):
    holding = [path for path in tracked.rglob("*") if path.is_file() and b"9/secret" in path.read_bytes()]
    assert holding == []
    assert yaml.safe_load((tracked / "config.yaml").read_text())["alerts"]["webhook"] is None


def test_looking_does_not_change_what_is_learned(store, tracked, tmp_path):
    assert main(command(store, tmp_path / "run", "wandb.mode=disabled", "train.log_every=60")) == 0
    for place in ("dictionary", "dictionaries/wide"):
        weights = [(out / place / "dictionary.safetensors").read_bytes() for out in (tracked, tmp_path / "run")]
        assert weights[0] == weights[1]
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert math.isfinite(last["gradient_norm"])


def test_sync_says_what_it_needs(tracked, tmp_path, capsys):
    assert main(["sync", str(tmp_path)]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err
    assert main(["sync", str(tracked), "wandb.mode=disabled"]) == 2
    assert "wandb.mode=disabled sends nothing" in capsys.readouterr().err


def test_tensorboard_without_its_package_is_refused(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as where the extra is not installed
    assert main(command(store, tmp_path / "run", "wandb.mode=disabled", "tensorboard=true")) == 2
    assert "error: tensorboard= needs tensorboardX; pip install tensorboardX" in capsys.readouterr().err
