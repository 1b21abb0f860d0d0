"""Trackers that break: the run ends as if nothing were the matter, says so once, and loses nothing."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sae_dist.cli.main import main
from sae_dist.monitor.metrics import JsonLines, read_metrics
from sae_dist.monitor.tracked import TrackedRun
from sae_dist.monitor.tracker_process import TrackerProcess
from tests.monitor.tracking import command, figures, runs
from tests.monitor.wandb_files import kept

RUN = TrackedRun("abc", "run", "group", "train", "", {})
DEADLINE_S = 1200


def start(out: Path, kind: str = "wandb", **options) -> TrackerProcess:
    wandb = {"folder": str(out), "mode": "offline", "project": "p", "entity": None}
    return TrackerProcess(kind, wandb | options, metrics=out / "metrics.jsonl", runs=[RUN])


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def children(name: str) -> list[psutil.Process]:
    """Processes that this one has started, by a word of their command lines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process] if name in " ".join(process.cmdline()) else []
        except psutil.Error:
            continue
    return found


def test_what_is_said_while_it_follows_is_there_in_the_end(tmp_path, caplog):
    lines, following = JsonLines(tmp_path / "metrics.jsonl"), start(tmp_path)
    lines(1, {"tokens": 10, "fvu": 0.5, "order_hash": "ab", "lr": None})
    wait_until(lambda: list((tmp_path / "wandb").glob("offline-run-*")))
    lines(2, {"tokens": 20, "fvu": 0.4, "alert": "the loss jumped to 7"})
    lines.close()
    following.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    found = kept(file)
    assert [(each["_step"], each["tokens"], each["fvu"]) for each in found.history] == [(1, 10, 0.5), (2, 20, 0.4)]
    assert found.alerts == [("run: step 2", "the loss jumped to 7")]
    assert "lr" not in found.history[0] and not caplog.records


def test_without_a_key_it_is_said_while_the_run_works(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "tokens": 0}\n')
    following = start(tmp_path, mode="online")
    wait_until(lambda: caplog.records)
    assert "wandb has ended" in caplog.text and "metrics.jsonl has all" in caplog.text
    assert "api_key" in caplog.text.lower() or "wandb login" in caplog.text
    following.close()
    assert len(caplog.records) == 1


def test_a_tracker_that_does_not_even_listen_holds_nobody_up(tmp_path):
    """What it is told does not fit into the pipe."""
    runs = [RUN._replace(config={"long": "x" * 1_000_000})]
    process = TrackerProcess("wandb", {}, metrics=tmp_path / "metrics.jsonl", runs=runs)
    process._process.send_signal(signal.SIGSTOP)
    assert process.finish(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["sae_dist.monitor.tracker_process", "wandb-core"])
def test_a_killed_tracker_costs_one_line_and_sync_makes_up_for_it(store, tmp_path, caplog, capsys, victim):
    out, killed = tmp_path / "run", []

    def kill() -> None:
        wait_until(lambda: list((out / "wandb").glob("offline-run-*/*.wandb")))
        killed.extend(children(victim))
        for process in killed:
            process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert main([*command(store, out, "wandb.mode=offline"), "train.steps=2000", "train.log_every=50"]) == 0
    killer.join()
    assert killed, f"no {victim}"
    assert caplog.text.count("metrics.jsonl has all, and `sae-dist sync") == 1
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(50, 2001, 50)]
    shutil.rmtree(out / "wandb")
    assert main(["sync", str(out)]) == 0
    assert [(each["_step"], each["fvu"]) for each in runs(out)["run"].history] == [(e["step"], e["fvu"]) for e in lines]


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_full_disk_is_said_at_once(tmp_path, caplog, kind):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(3000):
        lines(step, {"tokens": step, "fvu": 0.5} | {f"replica{i}": step for i in range(20)})
    with small_disk(tmp_path / kind):
        following = start(tmp_path, kind) if kind == "wandb" else start(tmp_path, kind, folder=str(tmp_path / kind))
        wait_until(lambda: caplog.records)
        following.close()
    lines.close()
    (record,) = caplog.records
    assert f"{kind} has ended (OSError: [Errno 28] No space left on device" in record.getMessage()


@contextmanager
def silent_server() -> Iterator[int]:
    """Accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
def test_a_server_that_never_answers_delays_the_end_only(store, tmp_path):
    with silent_server() as port:
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
        done = subprocess.run(
            [sys.executable, "-m", "sae_dist", *command(store, tmp_path / "run", "wandb.mode=online")],
            env=os.environ | environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("metrics.jsonl has all, and `sae-dist sync") == 1
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 12
    assert main(["sync", str(tmp_path / "run"), "wandb.mode=offline"]) == 0
    assert len(runs(tmp_path / "run")["run"].history) == 12


@pytest.mark.slow
def test_an_attempt_after_a_kill_has_the_whole_history(store, tmp_path):
    """Offline every attempt leaves a folder of its own, and the newest one has it all, each step once."""
    rule = '[{"point": "train.step", "where": {"step": 37}, "action": "kill"}]'
    keys = [*command(store, tmp_path / "run", "wandb.mode=offline"), "train.checkpoint_every=10"]
    victim = subprocess.run(
        [sys.executable, "-m", "sae_dist", *keys], env=os.environ | {"SAE_DIST_FAULTS": rule}, capture_output=True,
        timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert victim.returncode == -signal.SIGKILL, victim.stderr.decode()
    assert main(keys) == 0
    lines, found = read_metrics(tmp_path / "run" / "metrics.jsonl"), runs(tmp_path / "run")["run"]
    assert [figures(each)["_step"] for each in found.history] == [line["step"] for line in lines] == [*range(5, 61, 5)]
    ids = {path.name.split("-")[3] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert len(ids) == 4  # two dictionaries and their evaluations, the same at both starts
