"""The loader serves every row once, in one order for any number of ranks, and from any step on."""

import itertools
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards import commits, reader, stores, writer
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.records import seal
from tests.shards import predictable

HOOK = "resid_post.2"
ORDERS = [OrderConfig(lanes=4, window=2), OrderConfig(lanes=4, window=2, round_units=2), OrderConfig(lanes=7, window=1)]


@pytest.fixture
def store(tmp_path):
    return predictable.filled(storage.open(tmp_path))


def batches(store, n: int, **settings):
    settings = dict(hooks=Hooks((HOOK,)), batch=32, seed=9, order=ORDERS[0]) | settings
    with Loader(store, **settings) as loader:
        return list(itertools.islice(loader, n))


def ids(batch) -> list[tuple[int, int]]:
    return sorted(zip(batch.unit.tolist(), batch.row.tolist(), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_every_row_comes_once_an_epoch_and_is_true(store, order):
    rows = {unit: 96 - 7 * unit for unit in range(5)}  # not the held-out unit 5
    total = sum(rows.values())
    got = batches(store, 3 * total // 32, order=order)
    stream = []
    for batch in got:
        assert len(batch.x) == 32
        assert predictable.is_true(HOOK, batch.x, batch.doc, batch.pos)
        stream.append(ids(batch))
    flat = list(itertools.chain.from_iterable(stream))
    every = sorted((unit, row) for unit, n in rows.items() for row in range(n))
    counts = np.unique(np.array([u * 1000 + r for u, r in flat]), return_counts=True)[1]
    assert sorted(set(flat)) == every and counts.min() >= 2 and counts.max() <= 3
    whole = total // 32  # the batches that lie wholly in the first epoch
    assert len(set(itertools.chain.from_iterable(stream[:whole]))) == whole * 32
    assert [b.epoch for b in got] == [32 * s // total for s in range(len(got))]


@pytest.mark.parametrize("order", ORDERS)
def test_with_a_stop_it_ends_and_reads_nothing_for_later_steps(store, order, monkeypatch):
    read, original = [], store.read_slice
    monkeypatch.setattr(store, "read_slice", lambda *name: read.append(name) or original(*name))
    total = sum(96 - 7 * unit for unit in range(5))
    endless = batches(store, total // 32, order=order)
    read.clear()
    stopped = batches(store, 99, order=order, stop_step=total // 32)
    assert [(ids(b), b.order_hash) for b in stopped] == [(ids(b), b.order_hash) for b in endless]
    assert len(read) == len(set(read))  # the second epoch would read them again
    read.clear()
    assert len(batches(store, 99, order=order, start_step=1, stop_step=2)) == 1
    assert len(read) <= 2 * order.lanes * order.window  # of 25 or more in an epoch
    assert batches(store, 99, order=order, start_step=2, stop_step=2) == []


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_same_global_batches_and_their_hashes_add(store, world):
    alone = batches(store, 20)
    shared = [batches(store, 20, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in shared]
        assert sorted(itertools.chain.from_iterable(ids(p) for p in parts)) == ids(batch)
        assert sum(p.order_hash for p in parts) % 2**64 == batch.order_hash


@pytest.mark.parametrize("order", ORDERS)
def test_resume_at_any_step_yields_the_same_batches(store, order):
    whole = batches(store, 30, order=order)
    for start in (1, 6, 12, 13, 25):
        rest = batches(store, 30 - start, order=order, start_step=start, order_hash=whole[start - 1].order_hash)
        for a, b in zip(whole[start:], rest, strict=True):
            assert torch.equal(a.x, b.x) and (a.step, a.epoch, a.order_hash) == (b.step, b.epoch, b.order_hash)


def test_killing_and_resizing_four_two_three_keeps_the_order_hash(store):
    alone = [batch.order_hash for batch in batches(store, 24)]
    seen, total, step = [], 0, 0
    for world, steps in ((4, 7), (2, 9), (3, 8)):
        parts = [
            batches(store, steps, rank=r, world=world, start_step=step, order_hash=total if r == 0 else 0)
            for r in range(world)
        ]
        seen += [sum(p[i].order_hash for p in parts) % 2**64 for i in range(steps)]
        step, total = step + steps, seen[-1]
    assert seen == alone


def test_another_seed_is_another_order(store):
    assert batches(store, 1)[0].order_hash != batches(store, 1, seed=10)[0].order_hash


def test_a_growing_store_gives_the_batches_of_the_finished_one(tmp_path):
    order = OrderConfig(lanes=4, window=2, round_units=2)
    finished = batches(predictable.filled(storage.open(tmp_path / "done")), 20, order=order)
    store = writer.create(storage.open(tmp_path / "live"), predictable.meta())

    def produce():
        for unit in (1, 0, 3, 5, 2, 4):  # committed in any order
            time.sleep(0.05)
            predictable.write(store, unit, 96 - 7 * unit)

    producer = threading.Thread(target=produce)
    producer.start()
    with Loader(stores.open(store.storage), hooks=Hooks((HOOK,)), batch=32, seed=9, order=order, live=True) as loader:
        got = list(itertools.islice(loader, 20))
        assert loader.waits().uncommitted_s > 0
    producer.join()
    assert [b.order_hash for b in got] == [b.order_hash for b in finished]
    assert all(torch.equal(a.x, b.x) for a, b in zip(got, finished, strict=True))


def test_a_live_loader_says_when_producers_are_gone_and_can_be_closed_while_it_waits(tmp_path):
    store = writer.create(storage.open(tmp_path), predictable.meta())
    with pytest.raises(UserError, match=r"unit=0 .* was not committed"):
        next(Loader(store, hooks=Hooks((HOOK,)), batch=32, seed=9, live=True, stall_s=0.05))
    loader = Loader(store, hooks=Hooks((HOOK,)), batch=32, seed=9, live=True)
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_corruption_reaches_the_consumer_and_never_ends_the_stream_in_silence(store, tmp_path):
    shard = store.committed()[2].shards[HOOK]
    path = tmp_path / shard.key
    data = bytearray(path.read_bytes())
    data[shard.slices[0].offset + 600] ^= 1
    path.write_bytes(data)
    loader = Loader(stores.open(store.storage), hooks=Hooks((HOOK,)), batch=32, seed=9)
    with pytest.raises(UserError, match="unit 2 has to be harvested again"):
        for _ in range(100):
            next(loader)


def test_buffers_are_reused_only_when_asked_and_only_after_the_next_request(store):
    with Loader(
        store, hooks=Hooks((HOOK,)), batch=32, seed=9, order=ORDERS[0], reuse_buffers=True, prefetch=1
    ) as loader:
        truth = batches(store, 30)
        pointers = set()
        for expected in truth:
            batch = next(loader)
            time.sleep(0.001)
            assert torch.equal(batch.x, expected.x)
            pointers.add(batch.x.data_ptr())
    assert len(pointers) <= 4


WIDTHS = {"resid_post.1": 12, "resid_post.2": 16}
SIDES = [
    (("resid_post.1",), ("resid_post.2",)),
    (("resid_post.2", "resid_post.1"), ()),
    (("resid_post.1", "resid_post.2"), ("resid_post.2",)),
]


def columns_are_true(hooks, x, batch) -> bool:
    parts = x.split([WIDTHS[hook] for hook in hooks], 1)
    return all(predictable.is_true(hook, part, batch.doc, batch.pos) for hook, part in zip(hooks, parts, strict=True))


@pytest.mark.parametrize("reads, writes", SIDES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_rows_of_several_hooks_come_side_by_side_in_the_order_of_one(tmp_path, reads, writes, dtype, monkeypatch):
    store = predictable.filled(storage.open(tmp_path), hooks=WIDTHS, dtype=dtype)
    alone = batches(store, 40)
    read, original = [], store.read_slice
    monkeypatch.setattr(store, "read_slice", lambda *name: read.append(name) or original(*name))
    together = batches(store, 12, hooks=Hooks(reads, writes), stop_step=12)
    assert len(read) == len(set(read)) and {hook for hook, *_ in read} == {*reads, *writes}
    for batch, one in zip(together, alone, strict=False):
        assert batch.x.shape[1] == sum(WIDTHS[hook] for hook in reads) and columns_are_true(reads, batch.x, batch)
        assert columns_are_true(writes or reads, batch.target, batch)
        assert (batch.target is batch.x) == (not writes)
        assert batch.order_hash == one.order_hash and ids(batch) == ids(one)


def test_one_hook_is_read_once_and_its_target_is_no_copy(store):
    assert [b.order_hash for b in batches(store, 3, hooks=Hooks((HOOK,), (HOOK,)))] == [
        b.order_hash for b in batches(store, 3)
    ]
    with Loader(store, hooks=Hooks((HOOK,), (HOOK,)), batch=32, seed=9, stop_step=3) as loader:
        assert all(batch.target is batch.x for batch in loader)
        assert loader.waits().bytes == 3 * 32 * predictable.WIDTH * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_batches_that_nobody_holds_any_more_are_freed_or_used_again(tmp_path, dtype):
    store, seen = predictable.filled(storage.open(tmp_path), dtype=dtype), []
    with Loader(store, hooks=Hooks((HOOK,)), batch=32, seed=9, reuse_buffers=True, prefetch=1, stop_step=30) as loader:
        for batch in loader:
            seen.append(weakref.ref(batch.x))
            del batch
    assert len({id(x()) for x in seen if x() is not None}) <= 4


def test_hooks_whose_rows_are_of_other_tokens_are_refused(store, tmp_path):
    first, second = WIDTHS
    other = writer.create(storage.open(tmp_path / "other"), store.meta)
    rows = predictable.rows_of(0, 96) | {"token": np.zeros(96, np.int64)}
    x = {hook: predictable.activation(rows["doc"], rows["pos"], n) for hook, n in predictable.LAYERS.items()}
    writer.write_unit_once(other, 0, x, **rows)
    taken, record = other.commit(0).shards[second], commits.read_record(store.storage, 0)
    del record["digest"]
    shard = record["shards"][second]
    (tmp_path / shard["key"]).write_bytes((tmp_path / "other" / taken.key).read_bytes())
    record["shards"][second] = taken._asdict() | {"key": shard["key"], "slices": [s._asdict() for s in taken.slices]}
    (tmp_path / "commit" / "00000000.json").write_bytes(seal(record))
    mixed = stores.open(store.storage)
    assert len(batches(mixed, 13)) == 13  # each hook by itself is sound
    with pytest.raises(UserError, match=rf"unit 0 .* hook={second} and of hook={first} differ in their token"):
        batches(mixed, 13, hooks=Hooks((first,), (second,)))


def test_mistakes_are_named(store, tmp_path):
    with pytest.raises(UserError, match=r"hook=absent is not in .* it has resid_post.1, resid_post.2"):
        Loader(store, hooks=Hooks((HOOK,), ("absent",)), batch=32, seed=0)
    with pytest.raises(UserError, match=rf"hook={HOOK}\+{HOOK} names a hook point twice"):
        Loader(store, hooks=Hooks((HOOK, HOOK)), batch=32, seed=0)
    with pytest.raises(UserError, match=r"hook=nothing .* it has resid_post.1, resid_post.2"):
        Loader(store, hooks=Hooks(("nothing",)), batch=32, seed=0)
    with pytest.raises(UserError, match=r"world=9 readers with order.lanes=8"):
        Loader(store, hooks=Hooks((HOOK,)), batch=32, seed=0, world=9)
    with pytest.raises(UserError, match="n_units=6; the store has 5 training units"):
        Loader(store, hooks=Hooks((HOOK,)), batch=32, seed=0, n_units=6)
    half = writer.create(storage.open(tmp_path / "half"), predictable.meta())
    predictable.write(half, 0)
    with pytest.raises(UserError, match=r"lacks 4 of 5 training units \(unit 1 first\)"):
        Loader(half, hooks=Hooks((HOOK,)), batch=32, seed=0)
    assert len(batches(half, 2, n_units=1)) == 2


def test_held_out_rows_are_the_last_units_and_no_batch_has_them(store):
    held = list(reader.heldout(store, HOOK, 10))
    assert {r.unit for r in held} == {5} and sum(len(r.x) for r in held) == 61
    for rows in held:
        assert len(rows.x) <= 10 and predictable.is_true(HOOK, rows.x, rows.doc, rows.pos)
    assert 5 not in np.concatenate([b.unit for b in batches(store, 40)])


@pytest.mark.parametrize("rows", [1, 7, 30, 61, 500])
def test_the_first_held_out_rows_are_as_many_as_were_asked_for_whatever_slices_they_lie_in(store, rows):
    parts = [x for x, _ in reader.first_heldout_pairs(store, Hooks((HOOK,)), rows, 10)]
    every = torch.cat([part.x for part in reader.heldout(store, HOOK, 1000)])
    assert torch.equal(torch.cat(parts), every[:rows]) and max(map(len, parts)) <= 10
