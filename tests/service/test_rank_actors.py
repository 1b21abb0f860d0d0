"""A mesh of actors, for real: kill -9 of any rank, of the driver, in a checkpoint; the dictionary stays the same."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from sae_dist.cli.main import main
from tests.train.test_loop import rows_of

DEADLINE_S = 1200
STEPS = 60
pytestmark = pytest.mark.slow  # Ray takes its time to start processes


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("rows")
    np.save(place / "rows.npy", torch.cat([rows_of(unit) for unit in range(8)]).numpy())
    assert main(["store", "import", f"path={place}/rows.npy", f"store={place}/store"]) == 0
    return place / "store"


def command(store: Path, out: Path, *more: str) -> list[str]:
    return [
        "-m", "sae_dist", "train", f"store={store}", f"out={out}", "sae.n_latents=97", "sae.k=4",
        "sae.dead_after_tokens=1000", f"train.steps={STEPS}", "train.batch=64", "train.init_rows=256",
        "train.checkpoint_every=10", "train.log_every=5", "wandb.mode=disabled", "mesh.feature=2", *more,
    ]  # fmt: skip


def start(arguments: list[str], faults: list[dict] | None = None) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "SAE_DIST_FAULTS"}
    if faults:
        environment["SAE_DIST_FAULTS"] = json.dumps(faults)
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, said
    return said


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def weights(out: Path) -> bytes:
    return (out / "dictionary" / "dictionary.safetensors").read_bytes()


def order_hash(out: Path) -> str:
    return json.loads((out / "summary.json").read_text())["order_hash"]


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory) -> Path:
    """By torchrun: the launcher does not show in the result."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish(start([*run, *command(store, out)]))
    return out


@pytest.mark.parametrize("seed", range(10))
def test_kill_9_of_ranks_is_mended_within_the_run_and_they_are_named(store, uninterrupted, tmp_path, seed):
    """Two kills a seed at random steps, and one of a rank that writes its part of a checkpoint, or commits it."""
    chance = random.Random(seed)
    deaths = [(chance.randrange(1, STEPS), chance.randrange(2)) for _ in range(2)]
    faults = [
        {"point": "train.step", "where": {"step": step, "rank": rank}, "action": "kill", "once": f"{tmp_path}/{n}"}
        for n, (step, rank) in enumerate(deaths)
    ]
    within = ("checkpoint.before_file", {"rank": 1}) if seed % 2 else ("checkpoint.before_commit", {})
    faults.append(
        {"point": within[0], "where": within[1], "action": "kill", "nth": 2, "once": f"{tmp_path}/checkpoint"}
    )
    said = finish(start(command(store, tmp_path / "run"), faults))
    assert said.count("the trainer died; restarting it from") == len(list(tmp_path.glob("[0-9]"))) + 1
    for step, rank in deaths:
        assert f"rank {rank} (" in said, (step, said)
    assert ", last at step" in said and "died: " in said
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert order_hash(tmp_path / "run") == order_hash(uninterrupted)


def test_jumprelu_on_two_by_two_ranks_is_killed_and_ends_the_same(store, tmp_path):
    jumprelu = ("sae=jumprelu", "mesh.data=2")
    finish(start(command(store, tmp_path / "whole", *jumprelu)))
    faults = [
        {"point": "train.step", "where": {"step": step, "rank": rank}, "action": "kill", "once": f"{tmp_path}/{step}"}
        for step, rank in ((13, 3), (34, 0))
    ]
    said = finish(start(command(store, tmp_path / "killed", *jumprelu), faults))
    assert said.count("the trainer died; restarting it") == 2
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "dictionary" / "config.json").read_text())
    assert config["variant"] == "jumprelu"


def test_a_rank_that_hangs_is_named_after_the_stated_time(store, uninterrupted, tmp_path):
    hang = {"point": "train.step", "where": {"step": 25, "rank": 1}, "action": "stop", "once": f"{tmp_path}/hung"}
    started = time.monotonic()
    said = finish(start(command(store, tmp_path / "run", "mesh.collective_timeout_s=15"), [hang]))
    assert re.search(r"rank 1 \(.*\), last at step \d+ \(.*\) is silent for", said), said
    assert time.monotonic() - started < 240
    assert weights(tmp_path / "run") == weights(uninterrupted)


@pytest.mark.parametrize("seed", range(10))
def test_kill_9_of_the_driver_and_the_same_command_end_in_the_same_dictionary(store, uninterrupted, tmp_path, seed):
    chance, metrics = random.Random(100 + seed), tmp_path / "run" / "metrics.jsonl"
    step = chance.randrange(1, STEPS)
    victim = start(command(store, tmp_path / "run", "train.log_every=1"), [
        {"point": "train.step", "where": {"step": step}, "action": "sleep", "seconds": 5}
    ])  # fmt: skip
    wait_until(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= step, victim)
    time.sleep(chance.random())  # a checkpoint may be under way
    family = [p for p in psutil.Process(victim.pid).children(recursive=True) if "Agent" not in p.name()]
    victim.kill()
    victim.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"left behind: {[process.name() for process in alive]}"
    finish(start(command(store, tmp_path / "run")))
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_a_request_to_stop_saves_and_exits_75_and_another_mesh_goes_on(store, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(command(store, out), [
        {"point": "train.step", "where": {"step": 30}, "action": "sleep", "seconds": 5}
    ])  # fmt: skip
    wait_until(lambda: any((out / "checkpoints").glob("step_*/checkpoint.json")), process)
    process.send_signal(signal.SIGTERM)
    assert "run the same command again" in finish(process, 75)
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    finish(start(command(store, out, "mesh.feature=1")))
    assert order_hash(out) == order_hash(uninterrupted)


def test_ray_train_mends_a_killed_worker_to_the_same_dictionary(store, uninterrupted, tmp_path):
    kill = {"point": "train.step", "where": {"step": 25, "rank": 1}, "action": "kill", "once": f"{tmp_path}/killed"}
    said = finish(start(command(store, tmp_path / "run", "train.launcher=ray_train"), [kill]))
    assert re.search(r"Ray Train starts the ranks again.*rank 1 \(.*\), last at step \d+ \(.*\) failed", said), said
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert order_hash(tmp_path / "run") == order_hash(uninterrupted)
    assert not Path("~/ray_results").expanduser().exists()


def test_under_ray_train_a_mistake_is_one_line_and_a_request_to_stop_saves(store, uninterrupted, tmp_path):
    more = ("train.launcher=ray_train",)
    said = finish(start(command(store, tmp_path / "mistake", "sae.k=25", *more)), 2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: sae.k=25 exceeds d_model=24: any 24 directions rebuild x; choose a smaller k"]
    out = tmp_path / "run"
    process = start(command(store, out, *more), [
        {"point": "train.step", "where": {"step": 30}, "action": "sleep", "seconds": 5}
    ])  # fmt: skip
    wait_until(lambda: any((out / "checkpoints").glob("step_*/checkpoint.json")), process)
    process.send_signal(signal.SIGTERM)
    assert "run the same command again" in finish(process, 75)
    finish(start(command(store, out)))
    assert weights(out) == weights(uninterrupted)


def test_a_mistake_that_a_rank_finds_is_one_line(store, tmp_path):
    said = finish(start(command(store, tmp_path / "run", "mesh.data=2", "order.lanes=2", "sae.k=25")), 2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: sae.k=25 exceeds d_model=24: any 24 directions rebuild x; choose a smaller k"]
