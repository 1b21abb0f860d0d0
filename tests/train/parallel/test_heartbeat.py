"""Who is alive: a rank that goes silent is named with all that is known of it; nobody listens on public addresses."""

import time

import psutil
import pytest

from sae_dist.train.parallel import heartbeat
from sae_dist.train.parallel.heartbeat import Heartbeat, HeartbeatMonitor, RankStatus, missing_ranks
from sae_dist.train.parallel.rendezvous import Rendezvous, attempt_store, connect_store, serve


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.05)


def test_a_silent_rank_is_named_with_where_it_was_last(quick):
    served = serve("127.0.0.1")
    rendezvous = Rendezvous(served.address, "attempt1")
    ranks = [Heartbeat(connect_store(rendezvous, 10), rank) for rank in range(3)]
    for step, rank in enumerate(ranks):
        rank.set_phase(40 + step, "training")
    listener = HeartbeatMonitor(attempt_store(served, "attempt1"), 3)
    time.sleep(0.2)
    listener.poll()
    assert listener.silent(0.5) is None
    assert {beat.step for beat in listener.statuses.values()} == {40, 41, 42}
    ranks[1].close()
    listener.poll()
    deadline = time.monotonic() + 20
    while (said := listener.silent(1.0)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
        listener.poll()
    assert said is not None
    assert said.startswith("rank 1 (") and "last at step 41 (training) is silent for" in said
    assert "rank 0" not in said and "rank 2" not in said
    assert "rank 1 (" in missing_ranks(attempt_store(served, "attempt1"), 3, patience_s=1.0)
    for rank in ranks:
        rank.close()


def test_an_attempt_hears_nothing_of_the_one_before(quick):
    served = serve("127.0.0.1")
    Heartbeat(connect_store(Rendezvous(served.address, "attempt1"), 10), 0).close()
    listener = HeartbeatMonitor(attempt_store(served, "attempt2"), 1)
    listener.poll()
    assert listener.statuses == {}
    assert listener.silent(0.0) is None  # it may still be starting


def test_the_meeting_point_listens_on_its_address_alone():
    served = serve("127.0.0.1")
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening if c.laddr.port == served.address.port] == ["127.0.0.1"]


def test_the_rank_that_others_wait_for_is_called_a_straggler(monkeypatch):
    monkeypatch.setattr(heartbeat, "WORK_S", 0.0)
    served = serve("127.0.0.1")
    listener = HeartbeatMonitor(served, 3)

    def beats(step: int, exchange: tuple[float, ...]) -> dict[int, RankStatus]:
        return {rank: RankStatus(rank, "host", 1, step, step, "training", s) for rank, s in enumerate(exchange)}

    listener.statuses = beats(1, (0.0, 0.0, 0.0))
    assert listener.stragglers() == []  # nothing to compare with yet
    listener._compared_at = time.monotonic() - 10
    listener.statuses = beats(9, (6.0, 0.5, 6.5))  # of ten seconds: two ranks waited most of the time, one did not
    (told,) = listener.stragglers()
    assert told.startswith("rank 1 (host, pid 1), last at step 9") and "works 95% of the time, the others 38%" in told
    listener._compared_at = time.monotonic() - 10
    listener.statuses = beats(20, (12.0, 6.5, 12.5))
    assert listener.stragglers() == []
