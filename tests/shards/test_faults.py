"""Processes are killed and stopped at every named point, on three storages: no row is lost, doubled or wrong."""

import itertools
import json
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from sae_dist import faults, storage
from sae_dist.config import UserError
from sae_dist.shards import gc, reader, stores, verify, writer
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader
from sae_dist.shards.records import CorruptData
from sae_dist.storage.s3 import S3Config, S3Storage
from tests.memory_storage import MemoryStorage
from tests.shards import children, predictable
from tests.shards.conftest import open_place

HOOK = "resid_post.2"
KILL = {"action": "kill"}
POINTS = {  # where a producer can die, and whether unit 2 is then committed
    "writer.before_data": False,
    "writer.before_hook": False,
    "writer.after_hook": False,
    "writer.before_commit": False,
    "writer.after_commit": True,
}


def joined(process, code: int = 0) -> None:
    process.join(60)
    assert process.exitcode == code


def assert_whole(store, units: int = 6) -> None:
    """Every unit is committed once and true, and after gc nothing is there but what commits name."""
    commits = store.committed()
    assert sorted(commits) == list(range(units))
    assert verify.verify(store).bad == []
    for hook, unit in itertools.product(store.meta.hooks, commits):
        parts = list(reader.unit_rows(store, hook, unit, 1000))
        assert all(predictable.is_true(hook, p.x, p.doc, p.pos) for p in parts)
        rows = predictable.rows_of(unit, store.meta.unit_rows)
        got = sorted(
            zip(*(np.concatenate([getattr(p, c) for p in parts]).tolist() for c in ("doc", "pos")), strict=True)
        )
        assert got == sorted(zip(rows["doc"].tolist(), rows["pos"].tolist(), strict=True))
    gc.collect(store, age_s=0, delete=True, now=time.time() + 60)
    named = {shard.key for commit in commits.values() for shard in commit.shards.values()}
    assert {entry.key for entry in store.storage.list("data/")} == named
    assert list(store.storage.leftovers()) == []


# The real S3 server answers as its double does; that it does is tested in test_storage.
ON_S3_SLOW = pytest.mark.parametrize(
    "durable", ["file", "double", pytest.param("seaweedfs", marks=pytest.mark.slow)], indirect=True
)


@ON_S3_SLOW
@pytest.mark.parametrize("point", POINTS)
def test_a_producer_killed_anywhere_leaves_whole_units_only(durable, point):
    store = writer.create(durable, predictable.meta())
    rule = {"point": point, **KILL, "where": {"unit": 2}, "nth": 2 if "hook" in point else 1}
    joined(children.start(children.produce, durable.uri, list(range(6)), faults=[rule]), -signal.SIGKILL)
    left = stores.open(durable)
    there = sorted(left.committed())
    assert there == [0, 1, 2][: 3 if POINTS[point] else 2]
    assert verify.verify(left).bad == []
    if not POINTS[point]:
        with pytest.raises(UserError, match="unit=2 .* is not committed"):
            left.read_slice(HOOK, 2, 0)
    for unit in range(6):
        assert predictable.write(store, unit).won == (unit not in there)
    assert_whole(left)


@pytest.mark.parametrize("point", ["storage.before_sync", "storage.before_rename"])
@pytest.mark.parametrize("nth", [1, 2, 5, 8])  # store.json, then data and commits
def test_a_writer_of_files_killed_anywhere_leaves_no_half_file(tmp_path, point, nth):
    place = storage.open(tmp_path / "s")
    rule = {"point": point, **KILL, "nth": nth}
    joined(children.start(children.make_and_produce, place.uri, list(range(6)), faults=[rule]), -signal.SIGKILL)
    assert len(list(place.leftovers())) == 1
    joined(children.start(children.make_and_produce, place.uri, list(range(6))))
    assert_whole(stores.open(place))


@pytest.mark.parametrize(
    "rule", [("storage.upload_begun", 1), ("storage.part_uploaded", 1), ("storage.part_uploaded", 2)]
)
@pytest.mark.parametrize("server", ["double", pytest.param("seaweedfs", marks=pytest.mark.slow)])
def test_a_producer_killed_within_an_upload_leaves_nothing_that_can_be_seen(request, rule, server, tmp_path):
    place = open_place(server, request, tmp_path)
    settings = dict(hooks={HOOK: 32_768}, n_units=2, heldout_units=0)  # 6 MiB a shard: two parts
    store = writer.create(place, predictable.meta(**settings))
    fault = {"point": rule[0], **KILL, "nth": rule[1]}
    child = children.start(children.produce, place.uri, [0], "", 5 << 20, faults=[fault])
    joined(child, -signal.SIGKILL)
    assert list(place.list("data/")) == [] and stores.open(place).committed() == {}
    assert len(list(place.leftovers())) == 1
    for unit in range(2):
        assert predictable.write(store, unit).won
    assert_whole(store, units=2)


def test_a_producer_that_hung_loses_and_cleans_up_after_itself(durable, tmp_path):
    store = writer.create(durable, predictable.meta())
    rule = {"point": "writer.before_commit", "action": "stop", "where": {"unit": 1}}
    report = tmp_path / "won"
    child = children.start(children.produce, durable.uri, [0, 1], str(report), faults=[rule])
    while "State:\tT" not in Path(f"/proc/{child.pid}/status").read_text():
        time.sleep(0.02)
    other = predictable.write(store, 1)  # the unit was handed to somebody else
    os.kill(child.pid, signal.SIGCONT)
    joined(child)
    assert other.won and report.read_text() == "1"
    assert stores.open(durable).commit(1).attempt == other.commit.attempt
    assert len(list(durable.list("data/"))) == 2 * len(store.meta.hooks)  # the loser deleted its own


@ON_S3_SLOW
def test_duplicate_producers_commit_each_unit_once(durable, tmp_path):
    store = writer.create(durable, predictable.meta())
    jobs = [children.start(children.produce, durable.uri, list(range(6)), str(tmp_path / f"{i}")) for i in range(3)]
    for job in jobs:
        joined(job)
    assert sum(int((tmp_path / f"{i}").read_text()) for i in range(3)) == 6
    assert gc.collect(store, age_s=0, now=time.time() + 60).orphans == []
    assert_whole(store)


@pytest.mark.parametrize("action", ["500", "503", "429", "reset", "lost", "lost500"])
def test_faults_at_the_commit_itself_leave_one_commit_and_no_orphan(double, action):
    store = writer.create(storage.open("s3://bucket/s"), predictable.meta())
    double.fail(action, method="PUT", key="s/commit/", nth=2)
    assert [predictable.write(store, unit).won for unit in range(6)] == [True] * 6
    assert gc.collect(store, age_s=0, now=time.time() + 60).orphans == []
    assert_whole(store)


def read_all(store) -> list[int]:
    with Loader(store, hooks=Hooks((HOOK,)), batch=32, seed=9, order=children.ORDER) as loader:
        batches = list(itertools.islice(loader, 20))
    assert all(predictable.is_true(HOOK, b.x, b.doc, b.pos) for b in batches)
    return [b.order_hash for b in batches]


def test_a_storm_of_every_fault_changes_no_row_and_costs_half_as_much_again(double):
    quick = S3Config(pause_s=0.01, longest_pause_s=0.1, read_timeout_s=1)
    calm = read_all(predictable.filled(MemoryStorage("calm")))
    place = S3Storage("bucket", "s", quick)
    for index, action in enumerate(("500", "503", "429", "reset", "cut", "lost", "lost500")):
        double.fail(action, share=0.02 + 0.01 * (index % 3))
    assert read_all(predictable.filled(place)) == calm
    double.rules.clear()
    assert verify.verify(stores.open(place)).bad == []
    assert place.counts["retries"] <= 0.5 * place.counts["requests"]


def test_an_outage_within_the_budget_is_sat_out_and_beyond_it_is_told(double):
    store = predictable.filled(storage.open("s3://bucket/s"))
    patient = S3Storage("bucket", "s", S3Config(pause_s=0.05, longest_pause_s=0.2, retry_s=30))
    rule = double.fail("503", times=25)
    assert read_all(stores.open(patient)) == read_all(store)
    assert rule.done == 25
    impatient = stores.open(S3Storage("bucket", "s", S3Config(pause_s=0.01, retry_s=0.1)))
    impatient.committed()
    double.fail("503", key="s/data/")
    with pytest.raises(storage.StorageError, match="run again to resume"):
        read_all(impatient)


def test_a_bit_flipped_on_the_way_is_read_again_and_at_rest_is_told(double):
    place = storage.open("s3://bucket/s")
    expected = read_all(predictable.filled(place))
    double.fail("flip", method="GET", key="s/data/", nth=3)
    assert read_all(stores.open(place)) == expected
    double.fail("flip", method="GET", key=f"s/data/{HOOK}/00000001/")
    with pytest.raises(CorruptData, match="unit 1 has to be harvested again"):
        read_all(stores.open(place))


@pytest.mark.parametrize("key", ["s/store.json", "s/commit/00000002.json", "s/manifest/"])
def test_a_bit_flipped_in_a_record_on_the_way_is_read_again(double, key):
    store = predictable.filled(storage.open("s3://bucket/s"))
    pinned = store.snapshot()
    rule = double.fail("flip", method="GET", key=key, nth=1)
    assert stores.open(store.storage).pinned(pinned.version) == pinned
    assert rule.done == 1


@ON_S3_SLOW
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_at_rest_reaches_the_consumer(durable, damage):
    store = predictable.filled(durable)
    shard = store.commit(3).shards[HOOK]
    data = bytearray(durable.read(shard.key))
    match damage:
        case "flip":
            data[shard.slices[0].offset + 700] ^= 32
            durable.write(shard.key, data)
        case "cut":
            durable.write(shard.key, data[: shard.slices[0].offset + 700])
        case "gone":
            durable.delete(shard.key)
    with pytest.raises(CorruptData, match="unit 3"):
        read_all(stores.open(durable))
    assert verify.verify(store).harvest_again == [3]
    verify.withdraw(store, [3])
    fresh = stores.open(durable)
    predictable.write(fresh, 3, 96 - 7 * 3)
    assert verify.verify(fresh).bad == [] and len(read_all(fresh)) == 20


def test_a_writer_on_a_full_disk_says_so_and_leaves_nothing(tmp_path):
    store = writer.create(storage.open(tmp_path), predictable.meta())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # every write beyond 2,000 bytes fails
    try:
        with pytest.raises(storage.StorageError, match="free space or move the store"):
            predictable.write(store, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(store.storage.list("data/")) == list(store.storage.leftovers()) == []
    assert predictable.write(store, 0).won


@pytest.mark.parametrize(
    "durable",
    ["file", *(pytest.param(each, marks=pytest.mark.slow) for each in ("double", "seaweedfs"))],
    indirect=True,
)
def test_ranks_in_processes_killed_and_resized_see_one_order(durable, tmp_path):
    """Worlds of 4, 2 and 3 processes over one store that grows meanwhile; one of them is killed and starts anew."""
    calm = read_all(predictable.filled(MemoryStorage("resize")))
    store = writer.create(durable, predictable.meta())
    step, total, seen = 0, 0, []
    for world, steps in ((4, 5), (2, 6), (3, 9)):
        reports = [str(tmp_path / f"{world}-{rank}") for rank in range(world)]
        jobs = [
            children.start(children.consume, durable.uri, reports[r], steps, step, total if r == 0 else 0, r, world)
            for r in range(world)
        ]
        if world == 2:  # a rank dies on the way: everybody starts again from the last step that all had told
            while len(children.told(reports[1])) < 2:
                time.sleep(0.02)
            jobs[1].kill()
            jobs[1].join()
            jobs[1] = children.start(children.consume, durable.uri, reports[1], steps, step, 0, 1, world)
        if world == 4:
            for unit in range(6):
                predictable.write(store, unit, 96 - 7 * unit)
        for job in jobs:
            joined(job)
        shares = [children.told(report) for report in reports]
        seen += [sum(share[s] for share in shares) % 2**64 for s in range(step, step + steps)]
        step, total = step + steps, seen[-1]
    assert seen == calm


@pytest.mark.parametrize("nth", [1, 5])
def test_copying_and_collecting_survive_being_killed(tmp_path, nth, double):
    source = predictable.filled(storage.open(tmp_path / "a"))
    rule = {"point": "copy.after_shard", **KILL, "nth": nth}
    joined(children.start(children.copy_store, str(tmp_path / "a"), "s3://bucket/b", faults=[rule]), -signal.SIGKILL)
    target = storage.open("s3://bucket/b")
    assert verify.verify(stores.open(target)).bad == []
    joined(children.start(children.copy_store, str(tmp_path / "a"), "s3://bucket/b"))
    assert stores.open(target).committed() == source.committed()
    for index in range(6):
        target.write(f"data/{HOOK}/0000000{index}/orphan.arrow", b"left")
    rule = {"point": "gc.before_delete", **KILL, "nth": nth}
    job = children.start(children.collect_garbage, target.uri, time.time() + 60, faults=[rule])
    joined(job, -signal.SIGKILL)
    joined(children.start(children.collect_garbage, target.uri, time.time() + 60))
    assert verify.verify(stores.open(target)).bad == [] and len(list(target.list("data/"))) == 12


def test_fault_points_do_nothing_unless_switched_on(monkeypatch):
    faults.point("writer.before_data", unit=1)
    monkeypatch.setenv(
        "SAE_DIST_FAULTS", json.dumps([{"point": "a", "action": "raise", "where": {"unit": 1}, "nth": 2}])
    )
    faults.point("b", unit=1)
    faults.point("a", unit=2)
    faults.point("a", unit=1)
    with pytest.raises(faults.InjectedFault, match="fault at a"):
        faults.point("a", unit=1)
    faults.point("a", unit=1)
    monkeypatch.setenv("SAE_DIST_FAULTS", '[{"point": "a", "action": "explode"}]')
    with pytest.raises(UserError, match="use one of kill, stop, raise, sleep"):
        faults.point("a")
