"""Sweeps that are killed, shared by drivers, and hit by points that cannot be trained; each a real command."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sae_dist import storage
from sae_dist.shards import stores
from sae_dist.sweep.folder import SweepFolder, read_points
from sae_dist.sweep.ledger import Ledger
from tests.train.test_loop import full_store

pytestmark = pytest.mark.slow
DEADLINE_S = 1200
SMOLLM2 = [
    "model=smollm2", "text=sample", "hook=resid_post.3", "harvest.tokens=65536", "harvest.heldout_tokens=8192",
    "harvest.unit_sequences=16", "order.round_units=4", "order.lanes=4", "train.tokens=60000", "train.batch=512",
    "train.init_rows=4096", "train.checkpoint_every=20", "train.log_every=5", "train.lr=1e-3",
    "evaluate.ce_sequences=8", "wandb.mode=disabled",
]  # fmt: skip
KEYS = [
    "train.batch=64", "train.init_rows=256", "train.log_every=10", "train.checkpoint_every=20", "wandb.mode=disabled",
]  # fmt: skip


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sae_dist", "sweep", *arguments, f"out={out}"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, said
    return said


def kill(driver: subprocess.Popen[str], *others: psutil.Process) -> None:
    """kill -9 of a driver, and of others with it."""
    driver.kill()
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    driver.communicate()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def outcomes(out: Path) -> dict[str, list[str]]:
    """What came of every try of every point."""
    ledger = Ledger(storage.open(out))
    ledger.refresh()
    return {point: [ended.outcome for ended in ledger.ends(point)] for point in ledger.points}


def drivers(out: Path) -> set[str]:
    """Who finished points."""
    ledger = Ledger(storage.open(out))
    ledger.refresh()
    return {ledger.ends(point)[-1].by for point in ledger.points}


def weights(folder: Path) -> bytes:
    return (folder / "dictionary" / "dictionary.safetensors").read_bytes()


def test_nine_points_from_text_killed_twice_are_each_trained_once_on_one_harvest(tmp_path):
    out = tmp_path / "sweep"
    arguments = ["run", *SMOLLM2, "sae.n_latents=256,512,1024", "sae.k=4,8,16"]
    driver = start(out, *arguments)
    wait_until(lambda: len(list(out.glob("stores/*/commit/*.json"))) >= 3, driver)
    kill(driver)  # alone: its pass saves and ends
    driver = start(out, *arguments)
    wait_until(lambda: any(out.glob("passes/*/checkpoints/step_*/checkpoint.json")), driver)
    kill(driver, *psutil.Process(driver.pid).children(recursive=True))
    said = finish(start(out, *arguments))
    assert said.count("done") >= 9
    tries = outcomes(out)
    assert len(tries) == 9 and all(own.count("done") == 1 and own[-1] == "done" for own in tries.values())
    assert len(list((out / "passes").iterdir())) == 1
    (place,) = (out / "stores").iterdir()
    store = stores.open(storage.open(place))
    assert len(store.committed()) == store.meta.n_units  # conditional commits: each unit once, whoever died
    hashes = {point.summary["order_hash"] for point in read_points(out)}
    assert len(hashes) == 1  # all saw the same rows
    for point in read_points(out):
        figures = point.summary["eval"]
        assert figures["ce_spliced"] is not None and figures["loss_recovered"] is not None
    alone = tmp_path / "alone"
    point = read_points(out)[4]
    own = [f"{key}={value}" for key, value in point.overrides.items()]
    command = [sys.executable, "-m", "sae_dist", "run", *SMOLLM2, *own, "pages=null", f"out={alone}"]
    finish(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    assert weights(SweepFolder(out).point(point.id)) == weights(alone)
    assert point.summary["eval"] == json.loads((alone / "summary.json").read_text())["eval"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("store")
    full_store(place)
    return place


def test_two_drivers_share_a_sweep(store, tmp_path):
    arguments = ["train", f"store={store}", *KEYS, "sae.n_latents=48", "sae.k=2,3,4,6", "train.steps=400",
                 "sweep.points_per_pass=1"]  # fmt: skip
    both = [start(tmp_path / "sweep", *arguments) for _ in range(2)]
    for driver in both:
        finish(driver)
    assert all(own == ["done"] for own in outcomes(tmp_path / "sweep").values())
    assert len(drivers(tmp_path / "sweep")) == 2


def test_a_driver_that_is_asked_to_stop_saves_and_the_command_goes_on_with_more_points(store, tmp_path):
    out = tmp_path / "sweep"
    arguments = ["train", f"store={store}", *KEYS, "sae.n_latents=48", "train.steps=800"]
    driver = start(out, *arguments, "sae.k=2,4")
    wait_until(lambda: any(out.glob("passes/*/checkpoints/step_*/checkpoint.json")), driver)
    driver.send_signal(signal.SIGTERM)
    finish(driver, 75)
    assert all(own == ["stopped"] for own in outcomes(out).values())
    finish(start(out, *arguments, "sae.k=2,4,8", "sweep.jobs=2"))
    tries = outcomes(out)
    assert sorted(tries.values()) == [["done"], ["stopped", "done"], ["stopped", "done"]]
    before = {path: path.stat().st_mtime_ns for path in out.glob("points/*/summary.json")}
    finish(start(out, *arguments, "sae.k=2,4,8"))
    assert {path: path.stat().st_mtime_ns for path in out.glob("points/*/summary.json")} == before


def test_a_point_that_fails_takes_no_other_along(store, tmp_path):
    out = tmp_path / "sweep"
    arguments = ["train", f"store={store}", *KEYS, "sae.n_latents=48", "sae.k=2,4", "train.lr=1e-3,1e30",
                 "train.steps=60"]  # fmt: skip
    said = finish(start(out, *arguments), code=3)
    points = {(point.overrides["sae.k"], point.overrides["train.lr"]): point for point in read_points(out)}
    assert {key: point.state for key, point in points.items()} == {
        (2, 1e-3): "done", (4, 1e-3): "done", (2, 1e30): "failed", (4, 1e30): "failed",
    }  # fmt: skip
    assert "lower train.lr" in points[2, 1e30].failure and points[2, 1e30].id in said
    finish(start(out, *arguments), code=3)
    assert {point.id: point.tries for point in read_points(out)} == {point.id: point.tries for point in points.values()}
    finish(start(out, *arguments, "retry=failed", "only=sae.k=4"), code=3)
    again = {(point.overrides["sae.k"], point.overrides["train.lr"]): point for point in read_points(out)}
    assert again[4, 1e30].tries == points[4, 1e30].tries + 1
    assert again[2, 1e30].tries == points[2, 1e30].tries


def test_a_pass_whose_process_is_killed_is_tried_again(store, tmp_path):
    rule = [{"point": "train.step", "where": {"step": 37}, "action": "kill", "once": str(tmp_path / "once")}]
    arguments = ["train", f"store={store}", *KEYS, "sae.n_latents=48", "sae.k=2,4", "train.steps=60"]
    command = [sys.executable, "-m", "sae_dist", "sweep", *arguments, f"out={tmp_path / 'sweep'}"]
    subprocess.run(
        command, env=os.environ | {"SAE_DIST_FAULTS": json.dumps(rule)}, check=True, timeout=DEADLINE_S
    )  # fmt: skip
    assert all(own == ["died", "done"] for own in outcomes(tmp_path / "sweep").values())


def test_halving_trains_the_best_to_the_end_and_says_why_others_stopped(store, tmp_path):
    out = tmp_path / "sweep"
    arguments = ["train", f"store={store}", *KEYS, "sae.n_latents=48", "sae.k=1,2,4,8", "train.lr=1e-3",
                 "train.steps=100", "sweep.halving.rungs=[0.2,0.5]", "sweep.halving.keep=0.5"]  # fmt: skip
    driver = start(out, *arguments)
    wait_until(lambda: any(out.glob("rungs/*/summary.json")), driver)
    kill(driver)
    finish(start(out, *arguments))
    points = {point.overrides["sae.k"]: point for point in read_points(out)}
    assert {k: (point.state, point.stopped_at, point.summary["steps"]) for k, point in points.items()} == {
        1: ("done", 20, 20), 2: ("done", 20, 20), 4: ("done", 50, 50), 8: ("done", None, 100),
    }  # fmt: skip
    assert points[4].stopped_why == "place 2 of 2 by held-out FVU"
    alone = tmp_path / "alone"
    keys = [f"store={store}", *KEYS, "sae.n_latents=48", "sae.k=4", "train.lr=1e-3", "train.steps=50"]
    subprocess.run([sys.executable, "-m", "sae_dist", "train", *keys, f"out={alone}"], check=True, timeout=DEADLINE_S)
    assert weights(SweepFolder(out).point(points[4].id)) == weights(alone)


def test_a_target_ends_the_sweep(store, tmp_path):
    arguments = ["train", f"store={store}", *KEYS, "sae.n_latents=48", "sae.k=8,4,2", "train.lr=1e-3", "train.steps=60",
                 "sweep.points_per_pass=1", "sweep.target_fvu=5"]  # fmt: skip
    finish(start(tmp_path / "sweep", *arguments))
    states = {point.overrides["sae.k"]: point.state for point in read_points(tmp_path / "sweep")}
    assert states == {8: "done", 4: "pending", 2: "pending"}
