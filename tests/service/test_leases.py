"""Who has which unit, and who has the store."""

import multiprocessing
import os
import signal
import time

import pytest

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.service.leases import Leases
from sae_dist.service.run_lease import run_lease


def test_units_go_out_in_order_and_those_of_a_dead_replica_first():
    leases = Leases(range(5), lease_s=10)
    assert [leases.grant(replica, 0.0).unit for replica in (1, 2, 1)] == [0, 1, 2]
    assert leases.take_back(1) == [0, 2]
    assert [leases.grant(2, 1.0).unit for _ in range(4)] == [0, 2, 3, 4]
    assert leases.grant(2, 1.0) is None
    assert (leases.pending, leases.leased, leases.retried) == (0, 5, 2)


def test_a_lease_lasts_as_long_as_its_replica_is_heard():
    leases = Leases(range(4), lease_s=10)
    leases.grant(1, 0.0)
    leases.grant(2, 0.0)
    leases.hear(1, 9.0)
    assert leases.overdue(10.0) == []
    assert leases.overdue(10.5) == [2]
    assert leases.overdue(19.5) == [1, 2]
    assert leases.expired == 3


def test_a_report_after_the_lease_was_taken_away_is_known_to_be_late():
    leases = Leases([7], lease_s=10)
    first = leases.grant(1, 0.0)
    leases.take_back(1)
    second = leases.grant(2, 20.0)
    assert (second.unit, second.attempt) == (7, first.attempt + 1)
    assert not leases.finish(first.attempt)
    assert leases.left == 1
    assert leases.finish(second.attempt)
    assert leases.left == 0


def hold(uri: str, ready, go_on) -> None:
    with run_lease(storage.open(uri), "runs/other", ttl_s=1.0) as lease:
        ready.set()
        while not go_on.wait(0.05):
            try:
                lease.check()
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


def test_a_store_is_filled_by_one_driver_at_a_time(tmp_path, holder):
    process, go_on = holder
    with (
        pytest.raises(UserError, match=rf"is being filled by process {process.pid} .*out=runs/other"),
        run_lease(storage.open(tmp_path), "runs/mine"),
    ):
        pass
    go_on.set()
    process.join(30)
    with run_lease(storage.open(tmp_path), "runs/mine") as lease:
        assert lease.token == 2


def test_the_lease_of_a_dead_process_of_this_machine_ends_at_once(tmp_path, holder):
    process, _ = holder
    process.kill()
    process.join()
    began = time.monotonic()
    with run_lease(storage.open(tmp_path), "runs/mine", ttl_s=1000):
        assert time.monotonic() - began < 100  # not a thousand: nobody waited for a sign of life


def test_a_holder_elsewhere_that_hangs_is_replaced_and_finds_out(tmp_path, holder, monkeypatch):
    process, _ = holder
    here = "sae_dist.service.run_lease._identity"
    monkeypatch.setattr(here, lambda pid: {"host": "elsewhere", "pid": pid, "machine": "another", "born": "1"})
    with pytest.raises(UserError, match="is being filled by"), run_lease(storage.open(tmp_path), "mine", ttl_s=5):
        pass  # it beats
    os.kill(process.pid, signal.SIGSTOP)
    with run_lease(storage.open(tmp_path), "mine", ttl_s=2) as lease:
        assert lease.token == 2
        os.kill(process.pid, signal.SIGCONT)
        process.join(30)
        assert process.exitcode == 3
        lease.check()
