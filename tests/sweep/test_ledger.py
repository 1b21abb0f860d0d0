"""Every try of a point is one driver's, and ends once, whoever dies or only sleeps meanwhile."""

import multiprocessing
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from sae_dist import storage
from sae_dist.shards import lease
from sae_dist.shards.records import CorruptData
from sae_dist.sweep.ledger import Ledger, Try, driving

POINTS = [f"{number:012x}" for number in range(12)]


def opened(place, *, ttl_s: float = 0.2) -> Ledger:
    """The ledger as a driver sees it that is not registered: others take it for one that died without a sign."""
    ledger = Ledger(place, uuid.uuid4().hex, ttl_s=ttl_s)
    for point in POINTS:
        ledger.add(point, {"seed": int(point, 16)})
    ledger.refresh()
    return ledger


def elsewhere(place, ledger: Ledger) -> lease.LeasedPlace:
    """Registers the driver of a ledger as one of another machine, which has given no sign of life yet."""
    held = lease.LeasedPlace(place, "out", f"ledger/drivers/{ledger.driver}")
    held.take(1, lease.LeaseHolder(uuid.uuid4().hex, "sweeps/a", "elsewhere", 1))
    return held


def take_once_silent(ledger: Ledger, point: str) -> Try:
    """Takes a point from a driver as soon as that counts as dead."""
    deadline = time.monotonic() + 30
    while (taken := ledger.take(point, together=1)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return taken


def take_all(uri: str) -> list[str]:
    with driving(storage.open(uri)) as ledger:
        for point in POINTS:
            ledger.add(point, {"seed": int(point, 16)})
        ledger.refresh()
        mine = [point for point in POINTS if ledger.take(point, together=1)]
        time.sleep(0.3)  # none is let go of before all have tried
        return mine


def test_of_many_drivers_each_point_is_taken_by_one(tmp_path):
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(take_all, [str(tmp_path)] * 6))
    assert sorted(point for mine in taken for point in mine) == POINTS


def test_a_point_goes_from_pending_to_done_and_a_failed_one_can_be_taken_again(tmp_path):
    with driving(storage.open(tmp_path)) as ledger:
        ledger.add("a", {"sae.k": 4})
        assert ledger.state("a") == "pending" and ledger.tries("a") == 0
        first = ledger.take("a", together=3)
        assert first == Try("a", 1) and ledger.state("a") == "leased"
        assert ledger.take("a", together=1) is None
        assert ledger.end(first, "failed", failure="no room")
        assert ledger.state("a") == "failed"
        second = ledger.take("a", together=1)
        assert second == Try("a", 2)
        assert ledger.end(second, "done", seconds=2.5, cost=0.1)
        other = Ledger(storage.open(tmp_path))
        other.refresh()
        assert other.state("a") == "done" and other.points["a"].overrides == {"sae.k": 4}
        assert [ended.outcome for ended in other.ends("a")] == ["failed", "done"]
        assert (other.ends("a")[1].seconds, other.ends("a")[0].failure) == (2.5, "no room")


def hold(uri: str, ready) -> None:
    with driving(storage.open(uri)) as ledger:
        ledger.add("a", {})
        ledger.take("a", together=1)
        ready.set()
        time.sleep(600)


def test_kill_9_of_a_driver_frees_its_points_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    victim = context.Process(target=hold, args=(str(tmp_path), ready), daemon=True)
    victim.start()
    assert ready.wait(30)
    with driving(storage.open(tmp_path)) as ledger:
        ledger.refresh()
        assert ledger.state("a") == "leased" and ledger.take("a", together=1) is None
        victim.kill()
        victim.join()
        assert ledger.state("a") == "pending"
        assert ledger.take("a", together=1) == Try("a", 2)
        assert [ended.outcome for ended in ledger.ends("a")] == ["lost"]


def test_a_driver_elsewhere_is_dead_when_its_beats_stop_and_what_it_says_later_counts_no_more(tmp_path):
    place = storage.open(tmp_path)
    asleep = opened(place)
    held = elsewhere(place, asleep)
    taken = asleep.take(POINTS[0], together=1)
    with driving(place, ttl_s=0.5) as other:
        other.refresh()
        for beat in range(6):  # for longer than ttl_s
            held.beat(1, lease.Heartbeat(beat, False))
            assert other.state(POINTS[0]) == "leased"
            time.sleep(0.15)
        again = take_once_silent(other, POINTS[0])
        assert again == Try(POINTS[0], 2)
        assert not asleep.end(taken, "done", seconds=1.0)
        assert other.end(again, "done", seconds=3.0)
        asleep.refresh()
        assert [ended.outcome for ended in asleep.ends(POINTS[0])] == ["lost", "done"]


def test_a_driver_that_is_heard_again_is_gone_no_more(tmp_path):
    place = storage.open(tmp_path)
    paused = opened(place)
    held = elsewhere(place, paused)
    lost, kept = (paused.take(point, together=1) for point in POINTS[:2])
    with driving(place, ttl_s=0.3) as other:
        other.refresh()
        assert take_once_silent(other, POINTS[0]) == Try(POINTS[0], 2)
        held.beat(1, lease.Heartbeat(1, False))
        assert other.state(POINTS[1]) == "leased" and other.take(POINTS[1], together=1) is None
        paused.refresh()
        assert not paused.counts(lost) and paused.counts(kept)


def test_a_time_in_which_a_driver_did_not_look_is_no_silence_of_the_others(tmp_path):
    """After a pause of the storage or of all drivers, none of them takes the others for dead."""
    place = storage.open(tmp_path)
    paused = opened(place)
    elsewhere(place, paused)
    paused.take(POINTS[0], together=1)
    with driving(place, ttl_s=0.3) as other:
        other.refresh()
        assert other.state(POINTS[0]) == "leased"
        time.sleep(0.6)
        assert other.state(POINTS[0]) == "leased" and other.take(POINTS[0], together=1) is None


def test_what_a_dying_driver_has_just_finished_is_not_done_again(tmp_path):
    place = storage.open(tmp_path)
    dying = opened(place)
    taken = dying.take(POINTS[0], together=1)
    with driving(place, ttl_s=0.1) as other:
        other.refresh()
        assert other.state(POINTS[0]) == "leased"
        assert dying.end(taken, "done")
        deadline = time.monotonic() + 30
        while other.state(POINTS[0]) != "done":  # once it counts as dead, and its try would be ended as lost
            assert other.take(POINTS[0], together=1) is None and time.monotonic() < deadline
            time.sleep(0.02)


def test_points_of_a_pass_that_was_split_go_into_smaller_ones(tmp_path):
    with driving(storage.open(tmp_path)) as ledger:
        ledger.add("a", {})
        for together, left in ((9, 4), (4, 2), (2, 1), (1, 1)):
            assert ledger.end(ledger.take("a", together=together), "split")
            assert (ledger.state("a"), ledger.most("a")) == ("pending", left)


def test_a_damaged_record_is_refused_by_name(tmp_path):
    opened(storage.open(tmp_path))
    (tmp_path / "ledger" / POINTS[0] / "point.json").write_text('{"overrides": {"seed": 7}, "digest": "0"}')
    with pytest.raises(CorruptData, match=rf"{POINTS[0]}/point.json does not match its own digest"):
        Ledger(storage.open(tmp_path)).refresh()
