"""Who holds a place: one process at a time, until it is done, dead or silent."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards import lease, records


def hold_store(place, out, *, ttl_s=lease.TTL_S):
    return lease.lease(place, out, key="store", folder="producers", ttl_s=ttl_s)


def hold(uri: str, ready, go_on) -> None:
    with hold_store(storage.open(uri), "runs/other", ttl_s=1.0) as held:
        ready.set()
        while not go_on.wait(0.05):
            try:
                held.check()
            except UserError:
                os._exit(3)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the store at tmp_path, and the event that ends it."""
    context = multiprocessing.get_context("fork")
    ready, go_on = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready, go_on), daemon=True)
    process.start()
    assert ready.wait(30)
    yield process, go_on
    process.kill()
    process.join()


def suspend(process) -> None:
    """Stops the process and waits until its threads stand still: the signal alone lets a beat end its rename."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_a_store_is_filled_by_one_driver_at_a_time(tmp_path, holder):
    process, go_on = holder
    with (
        pytest.raises(UserError, match=rf"is in use by process {process.pid} .*out=runs/other"),
        hold_store(storage.open(tmp_path), "runs/mine"),
    ):
        pass
    go_on.set()
    process.join(30)
    with hold_store(storage.open(tmp_path), "runs/mine") as held:
        assert held.token == 2


def test_the_lease_of_a_dead_process_of_this_machine_ends_at_once(tmp_path, holder):
    process, _ = holder
    process.kill()
    process.join()
    began = time.monotonic()
    with hold_store(storage.open(tmp_path), "runs/mine", ttl_s=1000):
        assert time.monotonic() - began < 100  # not a thousand: nobody waited for a sign of life


def test_a_holder_elsewhere_that_hangs_is_replaced_and_finds_out(tmp_path, holder, monkeypatch):
    process, _ = holder
    here = "sae_dist.shards.lease._identity"
    monkeypatch.setattr(here, lambda pid: {"host": "elsewhere", "pid": pid, "machine": "another", "born": "1"})
    with pytest.raises(UserError, match="is in use by"), hold_store(storage.open(tmp_path), "mine", ttl_s=5):
        pass  # it beats
    suspend(process)
    with hold_store(storage.open(tmp_path), "mine", ttl_s=2) as held:
        assert held.token == 2
        os.kill(process.pid, signal.SIGCONT)
        process.join(30)
        assert process.exitcode == 3
        held.check()


class Stalling(storage.LocalStorage):
    """A storage that stalls for a second once: it answers with a beat of before, and nobody can write meanwhile."""

    beats_read = 0

    def read(self, key, start=None, length=None):
        data = super().read(key, start, length)
        if key.endswith(".beat"):
            self.beats_read += 1
            if self.beats_read == 3:  # the first look, after those that found how it was
                time.sleep(1)
                threading.Timer(0.05, self.write, (key, records.seal({"beat": 2, "released": False}))).start()
        return data


def test_while_the_storage_stalls_a_holder_elsewhere_is_not_taken_for_dead(tmp_path):
    place = Stalling(tmp_path)
    held = lease.LeasedPlace(place, "store", "producers")
    held.take(1, lease.LeaseHolder(uuid.uuid4().hex, "runs/other", "elsewhere", 1))
    held.beat(1, lease.Heartbeat(1, False))
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"), hold_store(place, "mine", ttl_s=0.6):
        pass
    with hold_store(place, "mine", ttl_s=0.6) as mine:  # it has given no further sign
        assert mine.token == 2


def test_a_holder_of_this_machine_lives_under_whatever_name_the_machine_has(tmp_path, holder, monkeypatch):
    process, _ = holder
    suspend(process)  # so that no beat tells
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    place = storage.open(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {process.pid}"), hold_store(place, "mine"):
        pass


@pytest.fixture
def hidden(tmp_path_factory, monkeypatch) -> None:
    """/proc as one sees it who may not see the processes of others (hidepid)."""
    proc = tmp_path_factory.mktemp("proc")
    for name in ("sys/kernel/random/boot_id", "self/ns/pid"):
        (proc / name).parent.mkdir(parents=True)
    (proc / "sys/kernel/random/boot_id").write_text(Path("/proc/sys/kernel/random/boot_id").read_text())
    (proc / "self/ns/pid").symlink_to(os.readlink("/proc/self/ns/pid"))
    monkeypatch.setattr(lease, "PROC", proc)


@pytest.mark.parametrize("ours", [True, False])
def test_of_a_holder_that_proc_hides_the_beat_decides(tmp_path, holder, hidden, monkeypatch, ours):
    process, _ = holder

    def deny(*_: object) -> None:
        raise PermissionError

    if not ours:
        monkeypatch.setattr(os, "kill", deny)
    place = storage.open(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {process.pid}"), hold_store(place, "mine", ttl_s=5):
        pass  # it beats


def test_a_dead_process_is_dead_though_proc_hides_others(tmp_path, holder, hidden):
    process, _ = holder
    process.kill()
    process.join()
    began = time.monotonic()
    with hold_store(storage.open(tmp_path), "mine", ttl_s=1000):
        assert time.monotonic() - began < 100  # nobody waited for a sign of life


def spoil(place, key: str, **changes: object) -> None:
    """Seals the record at `key` anew with other values; without a field where the value is `...`."""
    record = json.loads(place.read(key)) | changes
    place.write(key, records.seal({k: v for k, v in record.items() if v is not ... and k != "digest"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"pid": ...}, "pid is missing"), ({"pid": "../1"}, "pid"), ({"host": 5}, "host"), ({"more": 1}, "more")],
)
def test_a_record_that_does_not_say_who_holds_the_place_is_named_and_the_beat_decides(
    tmp_path, holder, caplog, changes, said
):
    process, _ = holder
    place = storage.open(tmp_path)
    spoil(place, "producers/000001.json", **changes)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match="is in use by a process that its record does not name; wait for it"),
        hold_store(place, "mine", ttl_s=5),
    ):
        pass  # it beats
    (line,) = [record.getMessage() for record in caplog.records if "000001.json" in record.getMessage()]
    assert "makes no sense" in line and said in line and "\n" not in line
    process.kill()
    with hold_store(place, "mine", ttl_s=0.5) as held:
        assert held.token == 2


def test_a_beat_that_makes_no_sense_is_no_sign_that_the_holder_is_done(tmp_path, holder, caplog):
    process, _ = holder
    place = storage.open(tmp_path)
    suspend(process)
    spoil(place, "producers/000001.beat", released="perhaps")
    with pytest.raises(UserError, match=f"is in use by process {process.pid}"), hold_store(place, "mine"):
        pass
    assert "000001.beat makes no sense" in caplog.text


class Breaking:
    """A storage whose listings fail in a way that nobody has foreseen, once it is told to."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.broken = inner, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list(self, prefix: str = "") -> Any:
        if self.broken:
            raise KeyError("Contents")
        return self._inner.list(prefix)


def test_a_holder_that_cannot_renew_its_lease_any_more_says_so(tmp_path, caplog):
    breaking: Any = Breaking(storage.open(tmp_path))
    with hold_store(breaking, "runs/mine", ttl_s=0.3) as held:
        held.check()
        breaking.broken = True
        held._thread.join(30)
        with pytest.raises(RuntimeError, match=r"the lease is not renewed any more \(KeyError: 'Contents'\)"):
            held.check()
    assert "the lease is not renewed any more" in caplog.text
