"""What a finished run left, damaged: whoever reads it says so in one line, and the run's own command makes it again."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.service.run_folder import read_status
from sae_dist.service.summary import read_summary

OWN_FILES = ("summary.json", "status.json", "config.yaml", "dictionary/config.json")
READ_BY = {"evaluate": ("summary.json", "config.yaml", "dictionary/config.json")}  # status: test_status.py


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copy")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["dictionary.safetensors", "config.json"])
def test_a_damaged_dictionary_is_not_judged_and_is_made_again(finished, copy, capsys, caplog, name, damage):
    whole = (finished[0] / "dictionary" / name).read_bytes()
    damage(copy / "dictionary" / name)
    assert main(["evaluate", str(copy)]) == 2
    assert name in capsys.readouterr().err
    assert main([*finished[1], f"out={copy}"]) == 0
    assert name in caplog.text
    assert (copy / "dictionary" / name).read_bytes() == whole


def refused(capsys, name: str, *command: str) -> str:
    """The one line with which the command refuses, which must name the file."""
    code = main(list(command))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), (command, errors)
    assert name in errors[0]
    return errors[0]


@pytest.mark.parametrize("content", [b"", b"{", b"{{", b"{}", b"[]", b"null", b"7", b"\xff\xfe\x00", b"[" * 2_000])
@pytest.mark.parametrize("name", OWN_FILES)
def test_a_small_file_that_is_not_what_was_written_is_one_line(copy, capsys, name, content):
    (copy / name).write_bytes(content)
    for command, files in READ_BY.items():
        if name in files:
            refused(capsys, str(copy / name), command, str(copy))


@pytest.mark.parametrize(("name", "read"), [("summary.json", read_summary), ("status.json", read_status)])
def test_every_value_of_another_kind_is_refused_by_name(copy, name, read):
    whole = json.loads((copy / name).read_text())
    for key in whole.keys() - {"step", "tokens"}:  # of status.json for people alone
        for wrong in ([], {"a": [1]}, True, 10**400, float("nan")):
            (copy / name).write_text(json.dumps(whole | {key: wrong}))
            with pytest.raises(UserError, match=f"{copy / name} is damaged: "):
                read(copy)


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_one_line(copy, capsys, name):
    for make in (os.mkfifo, os.mkdir):
        shutil.move(copy / name, copy / "away")
        make(copy / name)
        for command, files in READ_BY.items():
            if name in files:
                refused(capsys, str(copy / name).removesuffix("/config.json"), command, str(copy))
        os.rmdir(copy / name) if make is os.mkdir else os.unlink(copy / name)
        shutil.move(copy / "away", copy / name)


def test_a_repeated_run_makes_again_what_it_can_and_refuses_what_it_cannot_tell(finished, copy, capsys, caplog):
    command = [*finished[1], f"out={copy}"]
    for name in ("summary.json", "status.json"):
        (copy / name).write_bytes(b"{")
        assert main(command) == 0
        assert f"{copy / name} is damaged" in caplog.text
        assert main(["status", str(copy)]) == 0
    (copy / "config.yaml").write_bytes(b"{{")
    assert "remove it and repeat the run's command" in refused(capsys, str(copy / "config.yaml"), *command)
    (copy / "config.yaml").unlink()
    assert main(command) == 0


def test_the_status_of_a_finished_run_has_its_figures_and_its_places(finished, copy, capsys):
    assert main(["status", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "10 of 10 steps" in said and "FVU " in said and "L0 4.000" in said
    assert f"dictionary  {copy}/dictionary" in said


def test_a_run_that_diverges_says_so_everywhere(finished, tmp_path, capsys, caplog):
    out = tmp_path / "diverged"
    command = [*finished[1], "train.lr=1", "train.steps=60", "train.log_every=5", f"out={out}"]
    assert main(command) == 0
    assert "ALERT: on held-out rows" in capsys.readouterr().out
    assert [record for record in caplog.records if record.getMessage().startswith("ALERT: on held-out rows")]
    for name in ("summary.json", "status.json"):
        assert "is worse than the mean" in json.loads((out / name).read_text())["alerts"][0]
    assert '"alert": "step ' in (out / "metrics.jsonl").read_text()
    assert main(["status", str(out)]) == 0
    assert "ALERT: on held-out rows" in capsys.readouterr().out
    assert main(["evaluate", str(out)]) == 0
    assert "alerts" in json.loads((out / "summary.json").read_text())


def test_a_full_disk_is_one_line(finished, tmp_path, capsys):
    """/dev/full takes nothing, as a disk that is full."""
    out = tmp_path / "full"
    out.mkdir()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    said = refused(capsys, str(out / "metrics.jsonl"), *finished[1], f"out={out}")
    assert "No space left on device; free space there" in said
    assert json.loads((out / "status.json").read_text())["state"] == "refused"


@pytest.mark.parametrize("out", ["s3://bucket/run", "s3:/bucket/run", "file:///tmp/run"])
def test_out_is_a_folder_on_a_disk_or_refused_before_anything_starts(finished, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    for command in (finished[1], ["run", "preset=tiny"], ["harvest", "store=s", "model=tiny-llama"]):
        refused(capsys, f"out={out} is not a folder on a disk", *command, f"out={out}")
    for command in ("evaluate", "pages"):
        assert "mirror=s3://bucket/prefix" in refused(capsys, f"out={out} is not a folder on a disk", command, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["/proc", "/proc/none", "/dev/null"])
def test_out_where_nobody_may_write_is_one_line(finished, capsys, out):
    refused(capsys, f"out={out} cannot be written", *finished[1], f"out={out}")


@pytest.mark.slow
def test_too_little_memory_is_one_line(finished, tmp_path):
    """A process that may have 2.3 GB wants 0.1 GB more than that for a fourth tensor."""
    sizes = ["sae.n_latents=1600000", "train.batch=4096", f"out={tmp_path / 'run'}"]
    starved = subprocess.run(
        [sys.executable, "-m", "sae_dist", *finished[1], *sizes], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2_300_000_000, 2_300_000_000)),
    )  # fmt: skip
    assert starved.returncode == 2, starved.stderr
    assert "error: too little memory" in starved.stderr.splitlines()[-1]
    assert "lower sae.n_latents" in starved.stderr.splitlines()[-1]
