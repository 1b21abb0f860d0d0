"""Several dictionaries in one pass, as commands: what they leave, kill -9, what is refused, and the main job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_dist.cli.main import main
from sae_dist.monitor.metrics import newest_metrics
from tests.service import main_job
from tests.train.test_loop import rows_of

MORE = "more_dictionaries=[{n_latents: 160, seed: 1, name: wide}, {k: 8}]"
DICTIONARIES = {"main": "dictionary", "wide": "dictionaries/wide", "k8": "dictionaries/k8"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("rows")
    np.save(place / "rows.npy", torch.cat([rows_of(unit) for unit in range(8)]).numpy())
    assert main(["store", "import", f"path={place}/rows.npy", f"store={place}/store", "heldout_fraction=0.1"]) == 0
    return place / "store"


def command(store: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", f"store={store}", f"out={out}", "sae.n_latents=97", "sae.k=4", "train.steps=60", "train.batch=64",
        "train.init_rows=256", "train.checkpoint_every=10", "train.log_every=5", "wandb.mode=disabled", *more,
    ]  # fmt: skip


def weights(out: Path) -> dict[str, bytes]:
    return {name: (out / place / "dictionary.safetensors").read_bytes() for name, place in DICTIONARIES.items()}


@pytest.fixture(scope="module")
def together(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "together"
    assert main(command(store, out, MORE)) == 0
    return out


def test_each_member_has_a_dictionary_and_figures_of_its_own(store, together, tmp_path, capsys):
    assert main(command(store, tmp_path / "k8", "sae.k=8")) == 0
    assert weights(together)["k8"] == (tmp_path / "k8" / "dictionary" / "dictionary.safetensors").read_bytes()
    summary = json.loads((together / "summary.json").read_text())
    alone = json.loads((tmp_path / "k8" / "summary.json").read_text())
    wide, k8 = summary["also"]
    assert (summary["n_latents"], summary["k"]) == (97, 4)
    assert (wide["name"], wide["n_latents"], wide["k"], wide["seed"]) == ("wide", 160, 4, 1)
    assert (k8["dictionary"], k8["eval"]) == (str(together / "dictionaries" / "k8"), alone["eval"])
    assert "also" not in alone
    newest = newest_metrics(together / "metrics.jsonl")
    assert newest["k8/fvu"] < newest["fvu"]
    capsys.readouterr()
    assert main(["evaluate", str(together)]) == 0
    said = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in said.splitlines() if line.count("│") > 4}
    assert list(rows) == ["main", "wide", "k8"]
    assert f"{k8['eval']['fvu']:.3f}" in rows["k8"]
    assert json.loads((together / "summary.json").read_text())["also"] == summary["also"]
    assert main(command(store, together, MORE)) == 0  # finished: said again, nothing done
    assert "dictionaries of the pass" in capsys.readouterr().out


@pytest.mark.slow
def test_kill_9_and_the_same_command_end_in_the_same_dictionaries(store, together, tmp_path):
    rule = [{"point": "train.step", "where": {"step": 37}, "action": "kill"}]
    victim = subprocess.run(
        [sys.executable, "-m", "sae_dist", *command(store, tmp_path / "run", MORE)],
        env=os.environ | {"SAE_DIST_FAULTS": json.dumps(rule)}, capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert victim.returncode == -signal.SIGKILL, victim.stderr.decode()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(command(store, tmp_path / "run", MORE)) == 0
    assert weights(tmp_path / "run") == weights(together)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[{n_latent: 8}]", ".0: unknown key n_latent=8; remove it (--help lists the keys)"),
        ("[{k: 8}, {k: 8}]", ".1: there is another dictionary named k8; give it a name="),
        ("[{k: 25}]", "=k25: sae.k=25 exceeds d_model=24: any 24 directions rebuild x"),
        ("[8]", ".0=8: give keys and values, {a: b}"),
    ],
)
def test_wrong_members_are_one_line_and_exit_2(store, tmp_path, capsys, given, said):
    assert main(command(store, tmp_path / "run", f"more_dictionaries={given}")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error:")][0].startswith(f"error: more_dictionaries{said}")


def test_other_members_in_the_same_folder_are_another_run(store, together, capsys):
    assert main(command(store, together, "more_dictionaries=[{k: 8}]")) == 2
    assert "holds another run (more_dictionaries=" in capsys.readouterr().err


@pytest.mark.slow
def test_the_main_job_judges_every_member(tmp_path, capsys):
    out = tmp_path / "run"
    main_job.finish(main_job.start(out, "more_dictionaries=[{k: 4}, {n_latents: 64, seed: 1}]"))
    summary = json.loads((out / "summary.json").read_text())
    assert [one["name"] for one in summary["also"]] == ["k4", "n_latents64-seed1"]
    for one in (summary, *summary["also"]):
        figures = one["eval"]
        assert figures["ce_clean"] == summary["eval"]["ce_clean"]  # the model's own, whatever is spliced in
        assert figures["ce_spliced"] not in (figures["ce_clean"], figures["ce_zero_ablated"])
        assert 0 < one["eval"]["l0"] <= one["k"]
        assert (Path(one["dictionary"]) / "dictionary.safetensors").is_file()
    assert (out / "pages" / "index.html").is_file()
    assert main(["evaluate", str(out), "evaluate.ce_sequences=8"]) == 0
    again = json.loads((out / "summary.json").read_text())
    assert [one["eval"]["ce_tokens"] for one in (again, *again["also"])] == [8 * 127] * 3
