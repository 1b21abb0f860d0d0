"""The main job, for real: Ray, processes, kill -9, what is left, what is refused."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from transformers import LlamaForCausalLM

import sae_dist
from sae_dist.cli.main import main
from sae_dist.model import tiny
from sae_dist.sae import dictionary
from tests.service.main_job import command, files, finish, has_checkpoint, order_hashes, start, units, wait_until
from tests.shards import specification


def test_a_run_leaves_what_the_design_says(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == 60_000 // 256
    assert summary["tokens_trained"] == summary["steps"] * 256
    assert (summary["n_latents"], summary["d_model"], summary["k"]) == (128, 32, 8)
    figures = summary["eval"]
    assert 0 < figures["fvu"] < 0.6
    assert 0 < figures["l0"] <= 8
    clean, spliced, zero, mean = (figures[f"ce_{of}"] for of in ("clean", "spliced", "zero_ablated", "mean_ablated"))
    assert len({clean, spliced, zero, mean}) == 4  # which is larger is chance: the model is random
    assert figures["loss_recovered"] == pytest.approx((zero - spliced) / (zero - clean))
    assert figures["loss_recovered_mean"] == pytest.approx((mean - spliced) / (mean - clean))
    assert summary["order_hash"] == order_hashes(uninterrupted)[summary["steps"]]
    assert yaml.safe_load((uninterrupted / "config.yaml").read_text())["sae"]["n_latents"] == 128


def test_its_store_is_as_the_format_of_stores_says(uninterrupted):
    store = uninterrupted / "store"
    assert {"producers/<token>.json", "producers/<token>.beat"} < specification.objects(store)
    meta = specification.record(store, "store.json")["meta"]
    assert list(meta["extra"]) == list(specification.table("Entry of extra in a harvest"))
    for unit in (0, meta["n_units"] - 1):
        (hook,) = meta["hooks"]
        assert specification.rows(store, hook, unit).x.shape[1] == meta["hooks"][hook]
    assert json.loads((uninterrupted / "status.json").read_text())["state"] == "done"
    assert (uninterrupted / "pages" / "index.html").is_file()
    for name in ("dictionary.safetensors", "config.json"):
        assert (uninterrupted / "dictionary" / name).is_file()


def test_a_finished_run_is_not_done_again(uninterrupted, capsys):
    def stamps() -> dict[Path, int]:
        left = [
            path for path in uninterrupted.rglob("*") if path.is_file() and path.name not in ("status.json", ".lock")
        ]
        return {path: path.stat().st_mtime_ns for path in left if path.name != "config.yaml"}

    before = stamps()
    assert main(command(uninterrupted)[3:]) == 0
    assert "loss recovered" in capsys.readouterr().out
    assert stamps() == before


def test_a_run_that_was_copied_is_judged_by_what_is_in_the_copy(uninterrupted, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    shutil.rmtree(copy / "pages")
    summary = json.loads((copy / "summary.json").read_text())
    assert main(["evaluate", str(copy), "evaluate.ce_sequences=8"]) == 0
    again = json.loads((copy / "summary.json").read_text())
    assert again["eval"]["fvu"] == pytest.approx(summary["eval"]["fvu"], rel=1e-6)
    assert again["eval"]["ce_tokens"] == 8 * 127
    other = dictionary.load(copy / "dictionary")
    other.parameters.W_dec.mul_(0.5)
    dictionary.save(other, copy / "dictionary")
    assert main(["evaluate", str(copy)]) == 0
    assert json.loads((copy / "summary.json").read_text())["eval"]["fvu"] > 1.5 * summary["eval"]["fvu"]
    assert json.loads((uninterrupted / "summary.json").read_text()) == summary
    assert main(["pages", str(copy), "data=true"]) == 0
    described = sae_dist.features(copy)
    assert 0 < sum(described.read(range(128), ["firings"])["firings"].to_pylist()) <= 8 * described.rows
    assert main(["pages", str(copy), "pages.max_latents=16"]) == 0
    assert (copy / "pages" / "index.html").is_file()


def test_one_harvest_feeds_another_training_and_they_do_not_mix(uninterrupted, tmp_path, capsys):
    harvested = f"store={uninterrupted}/store"
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((2000, 32), np.float32))
    assert main(["store", "import", f"path={tmp_path}/rows.npy", "hook=resid_post.1", f"store={tmp_path}/b"]) == 0
    train = ["train", "hook=resid_post.1", "sae.n_latents=64", "sae.k=4", "train.steps=20", "train.batch=64",
             "train.init_rows=256", f"out={tmp_path}/run", "wandb.mode=disabled"]  # fmt: skip
    assert main([*train, harvested]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["hook"] == "resid_post.1"
    capsys.readouterr()
    assert main([*train, f"store={tmp_path}/b"]) == 2
    assert "choose another out=" in capsys.readouterr().err
    assert main([*train, harvested, "hook=resid_pre.0", f"out={tmp_path}/other"]) == 2
    assert "choose one of resid_post.1" in capsys.readouterr().err


@pytest.mark.slow
def test_one_harvest_at_two_hook_points_feeds_a_training_of_either(tmp_path, capsys):
    harvest = ["harvest", "model=tiny-llama", "text=sample", "hook=[resid_post.1,mlp_out.2]", "harvest.tokens=8000",
               "harvest.heldout_tokens=2000", "harvest.unit_sequences=8"]  # fmt: skip
    assert main([*harvest, f"store={tmp_path}/a", f"out={tmp_path}/harvest"]) == 0
    train = ["train", "sae.n_latents=64", "sae.k=4", "train.steps=20", "train.batch=64", "train.init_rows=256",
             f"store={tmp_path}/a", "wandb.mode=disabled"]  # fmt: skip
    for hook in ("resid_post.1", "mlp_out.2"):
        assert main([*train, f"hook={hook}", f"out={tmp_path}/{hook}"]) == 0
        assert json.loads((tmp_path / hook / "summary.json").read_text())["hook"] == hook
    capsys.readouterr()
    assert main([*train, "hook=resid_pre.0", f"out={tmp_path}/other"]) == 2
    assert "choose one of resid_post.1, mlp_out.2" in capsys.readouterr().err


def _folder_of(place: Path, rows: int) -> Path:
    """A model with an embedding of `rows` rows and the tokenizer of 257 tokens."""
    config = tiny.model("tiny-llama").config
    config.vocab_size = rows
    LlamaForCausalLM(config).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.mark.slow
def test_a_damaged_page_of_a_finished_run_is_made_again(uninterrupted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    page, summary = copy / "pages" / "data" / "latents-0.js", (copy / "summary.json").read_text()
    before = page.read_bytes()
    page.write_bytes(before[:-20])
    assert "data/latents-0.js: not what was written; making the pages again" in finish(start(copy))
    assert page.read_bytes() == before
    assert json.loads((copy / "summary.json").read_text())["eval"] == json.loads(summary)["eval"]


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["resid_post.1", "mlp_act.1"])
def test_pages_that_fail_leave_the_figures_and_are_tried_again(tmp_path, hook):
    """With more rows in the embedding than tokens, and at a hook point that is not in the residual stream."""
    out, keys = tmp_path / "run", [f"model={_folder_of(tmp_path / 'model', 300)}", f"hook={hook}"]
    out.mkdir()
    (out / "pages.partial").write_text("no folder")
    assert "NotADirectoryError" in finish(start(out, *keys), 1)
    figures = json.loads((out / "summary.json").read_text())["eval"]
    assert figures["ce_clean"] > 0 and not (out / "pages").exists()
    (out / "pages.partial").unlink()
    finish(start(out, *keys))
    assert json.loads((out / "summary.json").read_text())["eval"] == figures
    facts = (out / "pages" / "data" / "summary.js").read_text()
    assert ('"no_outputs":null' in facts) == (hook == "resid_post.1")


@pytest.mark.slow
def test_a_crosscoder_over_two_hook_points_is_trained_judged_and_shown(tmp_path):
    out = tmp_path / "run"
    finish(start(out, "hook=[resid_post.1,resid_post.2]"))
    summary = json.loads((out / "summary.json").read_text())
    figures, hooks = summary["eval"], ["resid_post.1", "resid_post.2"]
    assert [site["hook"] for site in summary["sites"]] == list(figures["fvu_by_hook"]) == hooks
    assert figures["loss_recovered"] is None and "a crosscoder" in figures["not_measured"]["loss_recovered"]
    assert "a crosscoder rebuilds 2 hook points" in (out / "pages" / "data" / "summary.js").read_text()
    assert main(["evaluate", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["eval"] == figures


@pytest.mark.parametrize(
    ("rows", "keys", "said"),
    [
        (200, [], "57 tokens beyond the 200 rows of the model's embedding"),
        (257, ["harvest.context=1024"], "harvest.context=1024, but model.name="),
        (257, ["hook=resid_post.4"], "hook='resid_post.4' does not exist in"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_any_text_is_read(tmp_path, capsys, rows, keys, said):
    model = _folder_of(tmp_path / "model", rows)
    assert main([*command(tmp_path / "run", f"model={model}", *keys)[3:]]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "text").exists()


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused(tmp_path, capsys):
    assert main([*command(tmp_path / "run")[3:], "harvest.gpus=1"]) == 2
    assert "the run needs 1 x {CPU: 1, GPU: 1}, one for each of its processes" in capsys.readouterr().err


def test_a_different_run_in_the_same_folder_is_refused(uninterrupted, capsys):
    assert main([*command(uninterrupted)[3:], "sae.k=9"]) == 2
    assert "holds another run (sae.k=8 there, 9 here)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_run_twice_at_once_is_refused(tmp_path, capsys):
    first = start(tmp_path / "run")
    wait_until(lambda: (tmp_path / "run" / "status.json").is_file(), first)
    assert main(command(tmp_path / "run")[3:]) == 2
    assert f"is in use by process {first.pid}" in capsys.readouterr().err
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()


@pytest.fixture
def _time_to_strike(monkeypatch):
    """The training waits after its first checkpoint: it takes two seconds in all, and could be over before the blow."""
    rule = {"point": "train.step", "where": {"step": 50}, "action": "sleep", "seconds": 4}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([rule]))


def kill(victim: subprocess.Popen[str], actor: str) -> None:
    found = [child for child in psutil.Process(victim.pid).children(recursive=True) if actor in child.name()]
    for child in found:
        child.kill()
    assert found, f"no {actor} to kill"


@pytest.mark.slow
@pytest.mark.usefixtures("_time_to_strike")
def test_a_run_whose_replica_and_trainer_are_killed_ends_in_the_same_dictionary(uninterrupted, tmp_path):
    out = tmp_path / "killed"
    driver = start(out, "train.keep_checkpoints=1")
    wait_until(lambda: units(out) >= 5, driver)
    kill(driver, "ray::Replica")
    wait_until(lambda: has_checkpoint(out), driver)
    kill(driver, "ray::RankActor")
    said = finish(driver)
    assert "replica 0 died at unit" in said
    assert "the trainer died; restarting it from step_" in said
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")
    shared = order_hashes(out).items() & order_hashes(uninterrupted).items()
    assert len(shared) == len(order_hashes(uninterrupted))


@pytest.mark.slow
@pytest.mark.usefixtures("_time_to_strike")
def test_a_request_to_stop_is_granted_and_the_same_command_goes_on(uninterrupted, tmp_path):
    out = tmp_path / "stopped"
    first = start(out)
    wait_until(lambda: has_checkpoint(out), first)
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:  # as systemd does
        process.send_signal(signal.SIGTERM)
    os.killpg(first.pid, signal.SIGTERM)
    assert "run the same command again" in finish(first, 75)
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    finish(start(out))
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")


@pytest.mark.slow
@pytest.mark.usefixtures("_time_to_strike")
@pytest.mark.parametrize("moment", [lambda out: units(out) >= 6, has_checkpoint])
def test_the_driver_killed_while_it_harvests_or_trains(uninterrupted, tmp_path, moment):
    out = tmp_path / "killed"
    victim = start(out)
    wait_until(lambda: moment(out), victim)
    family = psutil.Process(victim.pid).children(recursive=True)
    family = [process for process in family if "Agent" not in process.name()]  # Ray's agents go some minutes later
    victim.kill()
    victim.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"left behind: {[process.name() for process in alive]}"
    finish(start(out))
    assert files(out / "dictionary") == files(uninterrupted / "dictionary")
