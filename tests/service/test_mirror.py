"""A run's copy elsewhere: whole at the end, another run's never touched, and never in the run's way."""

import json
import logging
import shutil
import time
from pathlib import Path

import pytest

from sae_dist import storage
from sae_dist.cli.compose import compose
from sae_dist.config import UserError, load
from sae_dist.service import mirror, run_folder
from sae_dist.service.config import TrainJob
from sae_dist.service.run_folder import RunFolder
from tests.shards.conftest import double, durable, seaweed  # noqa: F401  fixtures


def job(uri: str, *overrides: str) -> TrainJob:
    return load(TrainJob, compose("train", ["store=s", f"mirror={uri}", *overrides]))


def test_all_that_others_may_see_is_there_at_the_end(durable, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    folder = RunFolder(out, job(durable.uri))
    assert storage.open(durable.uri).exists("config.yaml")  # it says whose copy this is, before anything else
    files = {"metrics.jsonl", "evaluate.json", "dictionary/config.json", "dictionaries/k64/config.json", "pages/a/b.js"}
    for name in files | {"checkpoints/step_1/x", "store/x", "pages/.hidden", "dictionary/x.part"}:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    folder.status("done")
    folder.close()
    there = storage.open(durable.uri)
    assert {entry.key for entry in there.list("")} == files | {"config.yaml", "status.json"}
    assert bytes(there.read("pages/a/b.js")) == b"pages/a/b.js"
    assert json.loads(bytes(there.read("status.json")))["state"] == "done"


def test_the_copy_follows_the_run_while_it_works(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY_S", 0.05)
    monkeypatch.setattr(run_folder, "HEARTBEAT_S", 0.1)
    place = storage.open(tmp_path / "copy")
    folder = RunFolder(tmp_path / "run", job(place.uri))
    folder.status("running", train={"step": 1})
    deadline, told = time.monotonic() + 60, set()
    while len(told) < 3:  # the run says nothing, and yet is heard of again and again
        assert time.monotonic() < deadline
        time.sleep(0.02)
        told |= {json.loads(bytes(place.read("status.json")))["time"]} if place.exists("status.json") else set()
    folder.close()


def test_a_long_file_is_copied_seldom(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY_S", 0.01)
    monkeypatch.setattr(mirror, "BYTES_PER_S", 1.0)
    there = storage.open(tmp_path / "copy")
    folder = RunFolder(tmp_path / "run", job(there.uri))
    for length in (1000, 1001):
        (tmp_path / "run" / "metrics.jsonl").write_text("x" * length)
        time.sleep(0.2)
    assert there.size("metrics.jsonl") == 1000
    folder.close()
    assert there.size("metrics.jsonl") == 1001


def test_what_belongs_to_another_run_is_refused_before_anything_starts(tmp_path):
    place = storage.open(tmp_path / "copy")
    RunFolder(tmp_path / "run", job(place.uri)).close()
    RunFolder(tmp_path / "run", job(place.uri, "train.log_every=1")).close()  # the same run goes on
    before = bytes(place.read("config.yaml"))
    for different in ("sae.k=31", "store=t"):
        key, _, value = different.partition("=")
        with pytest.raises(
            UserError, match=f"mirror={place.uri}: it is the copy of another run .{key}=.* there, {value}"
        ):
            RunFolder(tmp_path / "other", job(place.uri, different))
    assert bytes(place.read("config.yaml")) == before and not (tmp_path / "other" / "config.yaml").exists()
    place.write("config.yaml", b"{")
    with pytest.raises(UserError, match="config.yaml is damaged: it is not whole YAML; choose another place"):
        RunFolder(tmp_path / "other", job(place.uri))


def test_a_place_that_does_not_answer_is_not_refused_for_good(double, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mirror, "RETRY_S", 0.05)
    double.fail("503")
    with pytest.raises(storage.Unavailable, match="mirror=s3://bucket/copy: store=s3://bucket/copy: .* run again to"):
        RunFolder(tmp_path / "run", job("s3://bucket/copy"))


def test_a_place_that_is_no_copy_of_a_run_is_refused(tmp_path):
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "store.json").write_text("{}")
    (tmp_path / "file").write_text("")
    refusals = {
        tmp_path / "stores": "it holds store.json, and no copy of a run",
        tmp_path / "run" / "copy": "in the run's own folder",
        tmp_path / "file" / "x": "cannot be read",
        "s4://bucket": "unknown scheme s4",
    }
    for uri, reason in refusals.items():
        with pytest.raises(UserError, match=f"mirror={uri}.*{reason}"):
            RunFolder(tmp_path / "run", job(str(uri)))


def test_a_copy_that_fails_is_one_warning_and_no_more(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY_S", 0.01)
    folder = RunFolder(tmp_path / "run", job(str(tmp_path / "copy")))
    shutil.rmtree(tmp_path / "copy")
    Path(tmp_path / "copy").write_text("a file in its place")
    (tmp_path / "run" / "dictionary").mkdir()
    (tmp_path / "run" / "dictionary" / "config.json").write_text("{}")
    for step in range(20):
        folder.status("running", train={"step": step})
        time.sleep(0.02)
    folder.status("done")
    folder.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2, warnings
    assert "the run goes on" in warnings[0] and "repeat the command to complete it" in warnings[1]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
