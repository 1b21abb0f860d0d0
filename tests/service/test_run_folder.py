"""The run's folder: one process at a time, one run for ever."""

import subprocess
import sys
import time

import pytest

from sae_dist.cli.compose import compose
from sae_dist.config import UserError, load
from sae_dist.service import run_folder
from sae_dist.service.config import TrainJob, identity
from sae_dist.service.run_folder import RunFolder, is_claimed, read_status
from sae_dist.storage import Unavailable


def job(*overrides: str) -> TrainJob:
    return load(TrainJob, compose("train", ["store=s", *overrides]))


def test_a_folder_is_held_by_one_and_free_again_after(tmp_path):
    folder = RunFolder(tmp_path / "run", job())
    folder.status("running")
    assert is_claimed(tmp_path / "run")
    with pytest.raises(UserError, match="is in use by process"):
        RunFolder(tmp_path / "run", job())
    folder.status("done")
    with folder.recording_outcome():
        pass
    assert not is_claimed(tmp_path / "run")
    RunFolder(tmp_path / "run", job()).close()


def test_the_lock_goes_with_the_process_that_held_it(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from sae_dist.service import run_folder\n"
        "held = run_folder.claim(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert not is_claimed(tmp_path)


def test_another_run_is_refused_with_what_differs_and_nothing_is_held(tmp_path):
    RunFolder(tmp_path, job()).close()
    with pytest.raises(UserError, match=r"sae.k=32 there, 31 here"):
        RunFolder(tmp_path, job("sae.k=31"))
    assert not is_claimed(tmp_path)
    RunFolder(tmp_path, job("train.log_every=1", "wandb.mode=disabled")).close()


def test_work_adds_up_over_attempts(tmp_path):
    first = RunFolder(tmp_path, job())
    first.status("stopped")
    first.close()
    stopped = read_status(tmp_path)
    assert stopped is not None
    before = stopped["wall_seconds"]
    second = RunFolder(tmp_path, job())
    assert second.wall_seconds >= before
    second.close()


def test_a_run_whose_storage_does_not_answer_has_stopped_and_was_not_refused(tmp_path):
    folder = RunFolder(tmp_path, job())
    with pytest.raises(Unavailable), folder.recording_outcome():
        folder.status("running")
        raise Unavailable("store=s3://bucket/x: GET y failed for 120 s; run again to resume")
    said = read_status(tmp_path)
    assert said is not None and said["state"] == "stopped" and said.get("note", "").startswith("store=s3://bucket/x")


def test_a_status_grows_old_only_when_its_process_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_S", 0.1)
    folder = RunFolder(tmp_path, job())
    folder.status("evaluate", progress={"unit": 3})
    first = read_status(tmp_path)
    assert first is not None
    deadline, newer = time.monotonic() + 60, first
    while newer["time"] <= first["time"] + 0.2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        newer = read_status(tmp_path) or newer
    ages = ("time", "wall_seconds")
    assert {**newer, **dict.fromkeys(ages)} == {**first, **dict.fromkeys(ages)}  # and says since when it is the same
    folder.status("done")
    done = read_status(tmp_path)
    time.sleep(0.3)
    assert read_status(tmp_path) == done
    folder.close()


def test_new_facts_are_written_without_a_new_state(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_S", 0.1)
    folder = RunFolder(tmp_path, job())
    for step in range(50):
        folder.status("running", train={"step": step})
    deadline = time.monotonic() + 60
    while (read_status(tmp_path) or {}).get("train") != {"step": 49}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folder.close()


def test_identity_is_flat_and_leaves_out_what_is_free():
    assert identity(
        {"a": {"b": 1, "c": {"d": None}}, "wandb": {"mode": "x"}, "train": {"log_every": 3, "batch": 4}}
    ) == {
        "a.b": 1,
        "a.c.d": None,
        "train.batch": 4,
    }
