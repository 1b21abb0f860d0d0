"""verify, gc, copy, retention and credits: what is wrong is named, and nothing but garbage is ever deleted."""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards import consumers, copy, format, gc, records, retention, stores, summary, verify, writer
from sae_dist.shards.consumers import ConsumerPosition as Position
from sae_dist.shards.consumers import FlowControl
from sae_dist.shards.records import CorruptData
from tests.shards import children, predictable

HOOK = "resid_post.1"


def spoil(place, key: str, at: int = 900) -> None:
    data = bytearray(place.read(key))
    data[at] ^= 1
    place.write(key, data)


def test_verify_reads_every_byte_and_names_the_units(place):
    store = predictable.filled(place)
    shards = [store.commit(unit).shards for unit in range(6)]
    clean = verify.verify(store)
    assert (clean.bad, clean.units, clean.missing) == ([], 6, [])
    assert clean.bytes == sum(shard.bytes for unit in shards for shard in unit.values())
    spoil(place, shards[1][HOOK].key, at=shards[1][HOOK].bytes - 20)  # in the footer, which is in no slice
    place.write(shards[3]["resid_post.2"].key, bytes(place.read(shards[3]["resid_post.2"].key))[:-1])
    place.delete(shards[4][HOOK].key)
    spoil(place, format.commit_key(5), at=40)
    found = verify.verify(stores.open(place))
    assert found.harvest_again == [1, 3, 4, 5]
    problems = {bad.unit: bad.problem for bad in found.bad}
    assert problems[1].startswith("xxh3-128") and problems[3].endswith(f"instead of {shards[3]['resid_post.2'].bytes}")
    assert problems[4] == "gone" and "digest" in problems[5]


def test_withdrawn_units_are_harvested_again(place):
    store = predictable.filled(place)
    spoil(place, store.commit(2).shards[HOOK].key)
    verify.withdraw(store, [2])
    fresh = stores.open(place)
    assert fresh.commit(2) is None and len(list(place.list("withdrawn/"))) == 1
    assert predictable.write(fresh, 2).won
    assert verify.verify(fresh).bad == []
    with pytest.raises(UserError, match="nothing to withdraw"):
        verify.withdraw(fresh, [77])


def test_gc_finds_orphans_only_and_deletes_them_only_when_told(place):
    store = predictable.filled(place)
    place.write(format.shard_key(HOOK, 2, "deadbeef"), b"left by a killed producer")
    place.write("probe/" + "0" * 32, b"left by a killed probe")
    place.write("data/notes.txt", b"not ours")
    before = {entry.key for entry in place.list()}
    now = time.time()
    assert gc.collect(store, now=now).orphans == [] and gc.collect(store, now=now).young == 2
    dry = gc.collect(store, age_s=10, now=now + 60)
    assert sorted(e.key for e in dry.orphans) == [format.shard_key(HOOK, 2, "deadbeef"), "probe/" + "0" * 32]
    assert not dry.deleted and {entry.key for entry in place.list()} == before
    gc.collect(store, age_s=10, delete=True, now=now + 60)
    assert {entry.key for entry in place.list()} == before - {e.key for e in dry.orphans}
    assert verify.verify(store).bad == []


def test_gc_finds_files_that_a_killed_writer_left(tmp_path):
    store = predictable.filled(storage.open(tmp_path))
    left = tmp_path / "data" / ".partial-0123"
    left.write_bytes(b"half")
    assert "data/.partial-0123" not in {entry.key for entry in store.storage.list()}
    assert [e.key for e in gc.collect(store, age_s=0, now=time.time() + 9).orphans] == ["data/.partial-0123"]
    gc.collect(store, age_s=0, delete=True, now=time.time() + 9)
    assert not left.exists()


def test_gc_goes_by_the_clock_of_the_storage(tmp_path, monkeypatch):
    place = storage.open(tmp_path)
    store = predictable.filled(place)
    place.write(format.shard_key(HOOK, 2, "deadbeef"), b"of a unit in the making")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3 * gc.DAY_S)  # this machine's clock runs ahead
    found = gc.collect(store, delete=True)
    assert (found.orphans, found.young) == ([], 1)
    assert place.exists(format.shard_key(HOOK, 2, "deadbeef")) and not list(place.list("probe/"))


def test_a_producer_whose_data_was_deleted_before_its_commit_notices(tmp_path):
    store = writer.create(storage.open(tmp_path), predictable.meta())
    rule = {"point": "writer.before_commit", "action": "stop", "where": {"unit": 1}}
    child = children.start(children.produce, str(tmp_path), [0, 1], faults=[rule])
    while "State:\tT" not in Path(f"/proc/{child.pid}/status").read_text():
        time.sleep(0.02)
    gc.collect(store, age_s=0, delete=True, now=time.time() + 9)
    os.kill(child.pid, signal.SIGCONT)
    child.join(60)
    assert child.exitcode == 1
    assert sorted(store.committed()) == [0] and verify.verify(store).bad == []


@pytest.mark.parametrize("kinds", [("file", "double"), ("double", "file")])
def test_a_copy_is_the_same_store_and_is_resumed(kinds, tmp_path, double):
    places = {"file": tmp_path / "a", "double": "s3://bucket/a"}
    source = predictable.filled(storage.open(places[kinds[0]]))
    pinned = source.snapshot()
    target = storage.open(places[kinds[1]])
    half = writer.create(target, source.meta)
    copy._copy_unit(source, target, source.commit(3))  # an earlier copy that was interrupted here
    assert copy.copy(source, target)[::2] == (5, 1)
    assert copy.copy(source, target)[::2] == (0, 6)
    there = stores.open(target)
    assert there.committed() == source.committed() and there.pinned(pinned.version) == pinned
    assert verify.verify(half).bad == []


def test_a_copy_refuses_rotten_data_and_a_store_of_another_harvest(tmp_path):
    source = predictable.filled(storage.open(tmp_path / "a"))
    other = writer.create(storage.open(tmp_path / "b"), source.meta)
    predictable.write(other, 2)
    with pytest.raises(UserError, match="unit=2 was harvested independently"):
        copy.copy(source, other.storage)
    spoil(source.storage, source.commit(4).shards[HOOK].key)
    with pytest.raises(CorruptData, match="unit 4 has to be harvested again"):
        copy.copy(source, storage.open(tmp_path / "c"))
    assert stores.open(storage.open(tmp_path / "c")).commit(4) is None


def test_data_goes_only_when_every_consumer_has_saved_past_it(place):
    store = predictable.filled(place)
    assert retention.retire(store, retention.UntilConsumed()) == []  # nobody has read anything
    consumers.report(place, Position("a", taken=5, saved=3))
    consumers.report(place, Position("b", taken=4, saved=2))
    assert retention.retire(store, retention.Keep()) == []
    assert retention.retire(store, retention.UntilConsumed(margin_units=1)) == [0]
    assert retention.retire(store, retention.UntilConsumed()) == [1]
    for unit in range(6):
        if unit < 2:
            with pytest.raises(UserError, match=f"unit={unit} .* was retired"):
                store.read_slice(HOOK, unit, 0)
        else:
            store.read_slice(HOOK, unit, 0)
    assert store.statistics(HOOK).n == sum(96 - 7 * unit for unit in range(5))  # statistics outlive the data
    found = verify.verify(store)
    assert (found.bad, found.retired) == ([], [0, 1])
    assert not predictable.write(store, 0).won  # retired is not uncommitted: it is not harvested again
    consumers.report(place, Position("a", taken=6, saved=6))
    consumers.sign_off(place, "b")
    assert retention.retire(store, retention.UntilConsumed()) == [2, 3, 4]  # never the held-out unit 5


def test_a_ring_drops_the_oldest_bytes_as_far_as_consumers_allow(place):
    store = predictable.filled(place)
    sizes = [sum(shard.bytes for shard in store.commit(unit).shards.values()) for unit in range(6)]
    consumers.report(place, Position("a", taken=5, saved=3))
    assert retention.retire(store, retention.Ring(bytes=sum(sizes))) == []
    assert retention.retire(store, retention.Ring(bytes=sum(sizes) - 1)) == [0]
    assert retention.retire(store, retention.Ring(bytes=0)) == [1, 2]


class Listed:
    """A storage, and which prefixes were listed there; it can be told to refuse that."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.prefixes, self.down = inner, list[str](), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list(self, prefix: str = "") -> Any:
        self.prefixes.append(prefix)
        if self.down:
            raise storage.StorageError("the storage is away")
        return self._inner.list(prefix)


def test_a_store_is_listed_for_retirement_only_when_more_may_go(tmp_path):
    place = storage.open(tmp_path)
    predictable.filled(place)
    listed: Any = Listed(place)
    store = stores.open(listed)
    waste = retention.Retirement(store, retention.UntilConsumed())

    def looks(*saved: int, now: float) -> list[int]:
        listed.prefixes.clear()
        return waste.look([Position(f"reader{i}", 5, each) for i, each in enumerate(saved)], now)

    def tell(saved: int) -> None:
        consumers.report(place, Position("reader0", 5, saved))

    assert looks(now=0.0) == looks(0, now=2.0) == [] and not listed.prefixes  # nobody has saved
    tell(2)
    assert looks(2, now=4.0) == [0, 1] and "commit/" in listed.prefixes
    for now in (6.0, 8.0, 3600.0):
        assert looks(2, now=now) == [] and not listed.prefixes
    tell(3)
    listed.down = True
    with pytest.raises(storage.StorageError):
        looks(3, now=3602.0)
    listed.down = False
    assert looks(3, now=3604.0) == [2]
    waste = retention.Retirement(store, retention.Ring(bytes=0))  # of a driver that was started again
    assert looks(3, now=0.0) == [] and "commit/" in listed.prefixes
    assert looks(3, now=retention.RING_EVERY_S - 1) == [] and not listed.prefixes
    assert looks(3, now=retention.RING_EVERY_S) == [] and "commit/" in listed.prefixes


def test_an_interrupted_retirement_is_finished_by_gc(place):
    store = predictable.filled(place)
    place.create(format.retired_key(1), records.seal({"unit": 1, "saved": 2}))  # killed before it deleted the data
    orphans = gc.collect(store, age_s=0, now=time.time() + 9).orphans
    assert {e.key for e in orphans} == {shard.key for shard in store.commit(1).shards.values()}


def test_producers_are_held_for_the_slowest_reader_and_go_on_when_half_is_read():
    def seen(flow: FlowControl, *taken: int, out: int) -> FlowControl:
        return flow.look([Position(f"reader{i}", n, 0) for i, n in enumerate(taken)], out)

    assert FlowControl(0).look([], 10**6).room == math.inf  # no bound
    flow = seen(FlowControl(4), out=1)
    assert flow.room == 3
    flow = seen(flow, out=4)
    assert (flow.room, flow.blocked_by) == (0, "a reader that is still to come")
    flow = seen(flow, 3, 1, out=4)
    assert (flow.room, flow.blocked_by) == (0, "reader1")  # 3 wait: fewer than 4, more than half
    flow = seen(flow, 3, 2, out=4)
    assert (flow.room, flow.blocked_by) == (2, "")
    assert seen(flow, 3, 2, out=6).blocked_by == "reader1"
    assert seen(flow, out=6).room == math.inf  # all have signed off


def test_how_hungry_readers_are_is_what_the_hungriest_says():
    before = [Position("a", 1, 0, 2.0), Position("b", 1, 0, 5.0)]
    assert consumers.starved_share(before, [Position("a", 2, 0, 3.0), Position("b", 2, 0, 10.0)], 10.0) == 0.5
    assert consumers.starved_share(before, [Position("a", 2, 0, 2.0), Position("b", 1, 0, 5.0)], 10.0) == 0.0
    assert consumers.starved_share(before, before, 10.0) is None  # nobody has said anything new
    assert consumers.starved_share(before, [Position("c", 2, 0, 9.0)], 10.0) is None
    assert consumers.starved_share(before, [Position("a", 2, 0, 0.5)], 10.0) == 0.0  # it was started again


def test_a_store_is_summarised_from_its_commits(place):
    store = predictable.filled(place, dtype="int8")
    told = summary.summarize(store)
    assert (told.rows, told.n_units, told.heldout_units) == (96 * 6 - 7 * 15, 6, 1)
    assert told.bytes == verify.verify(store).bytes
    assert told.relative_error == {HOOK: 0.0, "resid_post.2": 0.0}  # the predictable model fits int8 exactly
    assert [unit.heldout for unit in told.units] == [False] * 5 + [True]
    assert summary.statistics(store)[HOOK].n == 96 * 5 - 7 * 10
