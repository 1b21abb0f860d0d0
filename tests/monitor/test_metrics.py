"""metrics.jsonl is the truth: what is written comes back, whatever cut it short."""

import errno
import fcntl
import io
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sae_dist.config import UserError
from sae_dist.monitor import metrics
from sae_dist.monitor.metrics import Follower, JsonLines, newest_metrics, read_metrics
from sae_dist.run_files import write_json


def test_lines_of_other_phases_do_not_get_between_the_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train, harvest = JsonLines(path), JsonLines(path, phase="harvest")
    train(10, {"fvu": 0.5})
    harvest(4096, {"units": 1})
    train.close()
    harvest.close()
    assert [entry["step"] for entry in read_metrics(path)] == [10]
    assert newest_metrics(path)["fvu"] == 0.5
    assert '{"phase": "harvest", ' in path.read_text()


def test_lines_come_back_in_order_and_a_step_done_again_counts_as_done_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step, fvu in [(10, 0.5), (20, 0.4), (30, 0.3), (20, 0.41), (30, 0.31)]:
        log(step, {"fvu": fvu})
    log.close()
    assert [(entry["step"], entry["fvu"]) for entry in read_metrics(path)] == [(10, 0.5), (20, 0.41), (30, 0.31)]
    assert newest_metrics(path)["fvu"] == 0.31


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fv')
    assert [entry["step"] for entry in read_metrics(path)] == [1]
    JsonLines(path).close()  # a run that went on and died before its first line
    assert newest_metrics(path)["step"] == 1
    assert newest_metrics(path)["step"] == 1


def test_the_line_after_a_cut_one_stands_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fv')
    log = JsonLines(path)
    log(2, {"fvu": 0.4})
    log.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    "line", ["[1]", "7", '{"step": "a"}', '{"fvu": 1}', '{"step": 1, "fvu": [1]}', '{"step": 1e99}']
)
def test_a_line_that_no_run_wrote_is_refused_by_name(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "fvu": 0.5}}\n{line}\n')
    for read in (read_metrics, newest_metrics):
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: .* remove that line"):
            read(path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a" / "status.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "status.json", {"x": object()})
    assert (tmp_path / "a" / "status.json").read_text() == '{\n  "x": 1\n}\n'


def test_a_follower_gives_each_whole_line_once(tmp_path):
    follower, path = Follower(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    assert follower.read() == []
    path.write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fv')
    assert [entry["step"] for entry in follower.read()] == [1]
    with path.open("a") as file:
        file.write('u": 0.4}\n{"phase": "harvest", "units": 3}\n')
    assert [entry.get("step") for entry in follower.read()] == [2, None]
    assert follower.read() == []


def test_a_file_longer_than_what_is_read_at_once_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "AT_ONCE", 64)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "fvu": 0.5}}\n' for step in range(50)))
    assert [entry["step"] for entry in read_metrics(path)] == [*range(50)]


class WithoutAppend(io.FileIO):
    """A file on NFS: what is written goes to the end that this machine knew before, not to that of now."""

    def write(self, data) -> int:
        end = self.seek(0, os.SEEK_END)
        time.sleep(0.001)
        return os.pwrite(self.fileno(), data, end)


def test_lines_of_several_machines_do_not_overwrite_each_other(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.touch()

    def append(writer: int) -> None:
        log = JsonLines(path)
        for number in range(25):
            log(25 * writer + number, {"fvu": 0.5})
        log.close()

    def opened(path, mode: str, **_: int) -> io.FileIO:
        return WithoutAppend(str(path), mode.replace("a", "r+"))

    monkeypatch.setattr(type(path), "open", opened)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(4)))
    monkeypatch.undo()
    lines = path.read_bytes().splitlines()
    assert sorted(metrics.entry_of(path, line)["step"] for line in lines) == [*range(100)]


def test_a_line_waits_for_the_process_that_has_the_lock(tmp_path):
    path, written = tmp_path / "metrics.jsonl", threading.Event()
    log = JsonLines(path)

    def append() -> None:
        log(1, {"fvu": 0.5})
        written.set()

    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=append)
        thread.start()
        assert not written.wait(0.2) and path.read_bytes() == b""
    assert written.wait(30)
    thread.join()
    log.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_no_line_back_and_says_so_once(tmp_path, monkeypatch, caplog, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in range(3):
        log(step, {"fvu": 0.5})
    log.close()
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2]
    (said,) = caplog.messages
    assert said == f"{path}: {os.strerror(number)}; lines of several machines may overwrite each other"


def test_a_line_that_did_not_fit_leaves_no_part_for_the_next_one_to_continue(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log, other = JsonLines(path), JsonLines(path, phase="alert")
    log(1, {"fvu": 0.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # every write beyond that fails
    try:
        with pytest.raises(OSError, match="No space left on device"):
            other(0, {"alert": "the disk is full"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log(2, {"fvu": 0.4})
    log.close()
    other.close()
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
