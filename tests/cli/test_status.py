"""sae-dist status: running, finished, stopped, killed and broken runs, lists of them, on disk and on object storage."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.service import run_status
from sae_dist.service.run_folder import claim
from sae_dist.service.run_status import read_run
from tests.shards.seaweedfs import KEYS

DEADLINE_S = 600  # of a process that loads torch on a machine that has much else to do


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "runs" / "copy")


@pytest.fixture
def s3(seaweed, monkeypatch) -> Iterator[str]:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": seaweed}.items():
        monkeypatch.setenv(name, value)
    yield "s3://bucket/runs"


def status(capsys, where: object, *more: str) -> str:
    assert main(["status", str(where), *more]) == 0
    return capsys.readouterr().out


def say(run: Path, **changes: Any) -> None:
    """Changes what status.json says; None removes a key."""
    path = run / "status.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def unfinished(run: Path, state: str = "running", **changes: Any) -> None:
    """Makes of a finished run one that has not come so far."""
    (run / "summary.json").unlink()
    say(run, state=state, train={"step": 10, "of": 10}, **changes)


def test_a_finished_run_has_its_figures_and_its_places(copy, capsys):
    said = status(capsys, copy)
    assert said.startswith("copy: done\n")
    for part in ("10 of 10 steps", "100%", "FVU ", "L0 4.000", f"dictionary  {copy}/dictionary", "step 10, "):
        assert part in said
    assert "!" not in said


def test_values_for_scripts_are_one_json_object(copy, capsys):
    found = json.loads(status(capsys, copy, "json=true"))
    assert (found["kind"], found["state"], found["works"], found["findings"]) == ("run", "done", False, [])
    assert found["progress"]["train"]["share"] == 1
    assert found["checkpoint"]["step"] == 10
    assert found["summary"]["eval"]["l0"] == 4


def test_a_killed_run_says_so_and_how_it_goes_on(copy, capsys):
    unfinished(copy, command="sae-dist train store=x", directory=os.getcwd())
    said = status(capsys, copy)
    assert said.startswith("copy: dead\n")
    assert "! no process works on it any more: it was killed while training" in said
    assert "    -> the same command resumes at step 10\n       sae-dist train store=x\n" in said
    say(copy, directory="/elsewhere")
    assert "       cd /elsewhere && sae-dist train store=x\n" in status(capsys, copy)
    shutil.rmtree(copy / "checkpoints")
    assert "trains anew, for there is no checkpoint" in status(capsys, copy)


@pytest.mark.parametrize(
    ("state", "note", "expected"),
    [
        ("stopped", "SIGTERM; the same command goes on", "! stopped: SIGTERM\n    -> the same command resumes"),
        ("refused", "no space left on device; free some", "! refused: no space left on device; free some"),
        ("failed", "RuntimeError: a rank died", "! failed: RuntimeError: a rank died"),
    ],
)
def test_a_run_that_ended_otherwise_says_why_and_how_it_goes_on(copy, capsys, state, note, expected):
    unfinished(copy, state, note=note)
    said = status(capsys, copy)
    assert said.startswith(f"copy: {state}\n")
    assert expected in said and "resumes at step 10" in said


def test_what_a_file_says_does_not_steer_the_terminal(copy, capsys):
    unfinished(copy, "failed", note="\x1b[2Jgone\nand on")
    assert "! failed:  [2Jgone and on\n" in status(capsys, copy)


@pytest.mark.parametrize("name", ["status.json", "config.yaml", "metrics.jsonl", "summary.json"])
def test_a_broken_file_is_a_line_beside_what_the_others_say(copy, capsys, name):
    path, cut = copy / name, name == "metrics.jsonl"  # whose last line may not be whole yet
    for damage in (os.mkfifo, os.mkdir, b"7\n", b"[]", *(() if cut else (b"", b"{", b"\xff\xfe\x00"))):
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(damage) if isinstance(damage, bytes) else damage(path)
        run = read_run(storage.open(copy))
        assert run is not None and run.state == "done"
        (line,) = run.damage
        assert str(path) in line and ("is damaged: " in line or "is no regular file" in line)
    said = status(capsys, copy)
    assert said.startswith("copy: done\n")
    found = [line for line in said.splitlines() if line.startswith(("  ! ", "    -> "))]
    assert len(found) == 2 and f"{path} is damaged: " in found[0]


@pytest.mark.parametrize("where", ["nothing", "empty", "file", "s3:/bucket"])
def test_where_there_is_nothing_to_read_it_is_one_line(tmp_path, capsys, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("x")
    for command in ([where], [where, "json=true"], [where, "watch=true"]):
        assert main(["status", *command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and where in line


def test_values_for_scripts_are_not_watched(tmp_path, capsys):
    assert main(["status", str(tmp_path), "json=true", "watch=true"]) == 2
    assert "json=true and watch=true: give one of them" in capsys.readouterr().err


def test_a_folder_of_runs_is_a_list_with_the_newest_first(copy, capsys, monkeypatch):
    old = shutil.copytree(copy, copy.with_name("old"))
    unfinished(old, time=json.loads((old / "status.json").read_text())["time"] - 200_000)
    broken = shutil.copytree(copy, copy.with_name("broken"))
    (broken / "status.json").write_text("{")
    (broken / "metrics.jsonl").unlink()
    copy.with_name("no run").mkdir()
    head, *rows = status(capsys, copy.parent).splitlines()
    assert head.split() == ["state", "progress", "FVU", "L0", "age", "run"]
    assert [row.split()[0] for row in rows] == ["done", "dead", "done"]
    assert [row.split()[-1] for row in rows] == ["copy", "old", "broken"]
    assert "2 days" in rows[1]
    monkeypatch.chdir(copy.parents[1])
    assert main(["status"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_watched_run_is_shown_until_it_ends(copy, capsys, monkeypatch):
    unfinished(copy)
    held = claim(copy)

    def end(_: float) -> None:
        say(copy, state="stopped", note="SIGTERM")
        held.close()

    monkeypatch.setattr(time, "sleep", end)
    first, *last = status(capsys, copy, "watch=true", "every=0.05").splitlines()
    assert first[8:].startswith("  training  train 100%  FVU ")
    assert last[0] == "copy: stopped"


def test_a_copy_on_object_storage_is_judged_by_its_age(finished, copy, s3, capsys):
    place = f"{s3}/mine"
    assert main([*finished[1], f"out={copy}", f"mirror={place}"]) == 0
    capsys.readouterr()
    said = status(capsys, place)
    assert said.startswith("mine: done\n") and "10 of 10 steps" in said and "L0 4.000" in said
    assert status(capsys, s3).splitlines()[1].split()[0::5] == ["done", "mine"]
    there, now = storage.open(place), time.time()
    assert bytes(there.read("dictionary/config.json")) == (copy / "dictionary" / "config.json").read_bytes()
    assert main(["evaluate", str(copy), "evaluate.batch_rows=128"]) == 0  # judged again, it is copied again
    assert bytes(there.read("summary.json")) == (copy / "summary.json").read_bytes()
    capsys.readouterr()
    values = json.loads(bytes(there.read("status.json")))
    for age_s, state in ((5, "training"), (100, "silent")):
        told = values | {"state": "running", "train": {"step": 10, "of": 10}, "time": now - age_s}
        there.write("status.json", json.dumps(told).encode())
        said = status(capsys, place)
        assert said.startswith(f"mine: {state}\n")
        assert ("the run is dead or hangs, or its copy" in said) == (state == "silent")
    assert f"ask `sae-dist status {copy}` on {values['host']}" in said
    there.write("status.json", b"{")
    assert f"! {place}/status.json is damaged: it is not whole JSON" in status(capsys, place)
    assert main(["status", f"{place}/none"]) == 2


@pytest.mark.slow
def test_a_real_run_is_watched_and_killed_and_resumed_by_the_command_that_is_shown(finished, tmp_path, s3, capsys):
    out, place = tmp_path / "run", f"{s3}/killed"
    command = [*finished[1], "train.steps=2000", "train.log_every=5", "train.checkpoint_every=50", f"out={out}",
               f"mirror={place}"]  # fmt: skip
    slowly = json.dumps([{"point": "train.step", "action": "sleep", "seconds": 0.1, "nth": 0}])  # to be looked at
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_dist", *command], stderr=subprocess.DEVNULL,
        env=os.environ | {"SAE_DIST_FAULTS": slowly},
    )  # fmt: skip
    try:
        wait_until(lambda: (run := read_run(storage.open(place))) is not None and run.state == "training", process)
        said = status(capsys, out)
        assert said.startswith("run: training\n") and " of 2,000 steps" in said and "tokens/s  ETA " in said
        assert "run: training" in watched(out, width=80)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert status(capsys, out).startswith("run: dead\n")
    found = json.loads(status(capsys, out, "json=true"))
    assert f"resumes at step {found['checkpoint']['step']:,}" in found["findings"][0]["do"]
    copied = read_run(storage.open(place), now=time.time() + run_status.SILENT_S)
    assert copied is not None and copied.state == "silent"
    program = Path(sys.executable).with_name("sae-dist")
    again = subprocess.run(["bash", "-c", f"{program}{found['command'].removeprefix('sae-dist')}"], check=False)
    assert again.returncode == 0
    assert status(capsys, place).startswith("killed: done\n")


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def watched(run: Path, width: int) -> str:
    """What a terminal shows of a run that is watched, up to Ctrl-C, which is no failure."""
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(width), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_dist", "status", str(run), "watch=true"],
        stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    said = b""
    while b"checkpoint" not in said:
        said += os.read(leader, 65_536)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 0
    os.close(leader)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
