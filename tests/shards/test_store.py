"""Writing and reading a store: what is committed is whole, true and there once."""

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards import format, manifest, permutation, reader, stores, verify, writer
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader
from sae_dist.shards.records import CorruptData
from tests.shards import predictable


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_every_row_of_every_hook_comes_back(place, dtype):
    store = predictable.filled(place, dtype=dtype)
    for hook in store.meta.hooks:
        for unit in range(store.meta.n_units):
            rows = list(reader.unit_rows(store, hook, unit, 9))
            doc, pos, token = (np.concatenate([getattr(r, name) for r in rows]) for name in ("doc", "pos", "token"))
            assert predictable.is_true(hook, torch.cat([r.x for r in rows]), doc, pos)
            expected = predictable.rows_of(unit, store.meta.unit_rows - 7 * unit)
            assert sorted(zip(doc, pos, token, strict=True)) == sorted(zip(*expected.values(), strict=True))


def test_rows_of_a_document_are_scattered_alike_in_all_hooks(place):
    store = predictable.filled(place)
    order = permutation.permutation(96, permutation.key(store.meta.seed, 0))
    for hook in store.meta.hooks:
        docs = np.concatenate([store.read_slice(hook, 0, i).doc for i in range(5)])
        assert docs.tolist() == predictable.rows_of(0, 96)["doc"][order].tolist()


def test_any_arrow_reader_opens_a_shard(tmp_path):
    store = predictable.filled(storage.open(tmp_path))
    shard = store.committed()[2].shards["resid_post.1"]
    with pa.memory_map(str(tmp_path / shard.key)) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema.metadata[b"sae.dtype"] == b"bfloat16"
    bits = table["act"].combine_chunks().values.to_numpy().reshape(-1, predictable.WIDTH)
    x = torch.from_numpy(bits.copy()).view(torch.bfloat16)
    assert predictable.is_true("resid_post.1", x, table["doc"].to_numpy(), table["pos"].to_numpy())


def test_local_slices_are_views_of_the_file(tmp_path):
    store = predictable.filled(storage.open(tmp_path))
    part = store.read_slice("resid_post.1", 0, 0)
    path = tmp_path / store.committed()[0].shards["resid_post.1"].key
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    address = part.bits.data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, _, end in (m[0].partition("-") for m in maps))


def test_creating_twice_is_the_same_store_and_another_meta_is_refused(every_place, tmp_path):
    first = writer.create(every_place, predictable.meta())
    assert writer.create(every_place, predictable.meta()).meta == first.meta
    with pytest.raises(UserError, match=r"slice_rows: 20 there, 24 here"):
        writer.create(every_place, predictable.meta(slice_rows=24))
    with pytest.raises(UserError, match=r"holds no store\.json"):
        stores.open(storage.open(tmp_path / "nothing"))


@pytest.mark.parametrize("hook", ["../x", "a/b", "", ".hidden", "a..b", "a b", "x" * 300])
def test_names_from_data_never_become_paths(hook):
    with pytest.raises(ValueError, match="hook="):
        predictable.meta(hooks={hook: 4})
    with pytest.raises(UserError, match="plain relative path"):
        storage.checked_key("data/../../etc/passwd")


def test_of_many_writers_of_one_unit_one_wins_and_the_others_leave_nothing(every_place):
    store = writer.create(every_place, predictable.meta())
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(predictable.write(stores.open(every_place), 1)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(written.won for written in results) == 1
    assert len({written.commit.attempt for written in results}) == 1
    assert len(list(every_place.list("data/"))) == len(store.meta.hooks)


def test_rows_that_are_not_finite_are_dropped_in_all_hooks_and_counted(place):
    store = writer.create(place, predictable.meta())
    rows = predictable.rows_of(0, 96)
    x = {h: predictable.activation(rows["doc"], rows["pos"], n) for h, n in predictable.LAYERS.items()}
    x["resid_post.1"][5, 3] = float("nan")
    x["resid_post.2"][50, 0] = float("-inf")
    x["resid_post.2"][5, 0] = 1e30  # its square overflows
    commit = writer.write_unit(store, 0, x, **rows, max_nonfinite=0.1)
    assert (commit.rows, commit.dropped) == (94, 2)
    for hook in predictable.LAYERS:
        got = list(reader.unit_rows(store, hook, 0, 100))
        assert torch.cat([r.x for r in got]).isfinite().all()
        assert sum(len(r.x) for r in got) == 94
    assert store.unit_statistics(0, "resid_post.1").nonfinite == 1
    assert store.unit_statistics(0, "resid_post.2").nonfinite == 2
    with pytest.raises(UserError, match="96 rows of 96"):
        writer.write_unit(store, 1, {h: torch.full((96, 16), torch.nan) for h in x}, **rows)
    assert store.commit(1) is None


def test_a_cast_that_overflows_is_seen_before_it_is_stored(place):
    store = writer.create(place, predictable.meta(dtype="float16", hooks={"resid_post.1": 16}))
    rows = predictable.rows_of(0, 96)
    x = predictable.activation(rows["doc"], rows["pos"], 1)
    x[7, 7] = 70_000  # finite, but not in float16
    assert writer.write_unit(store, 0, {"resid_post.1": x}, **rows, max_nonfinite=0.1).dropped == 1


def test_a_flipped_bit_is_found_and_names_the_unit(tmp_path):
    store = predictable.filled(storage.open(tmp_path))
    shard = store.committed()[3].shards["resid_post.2"]
    path = tmp_path / shard.key
    data = bytearray(path.read_bytes())
    data[shard.slices[1].offset + shard.slices[1].bytes - 9] ^= 4
    path.write_bytes(data)
    store.read_slice("resid_post.2", 3, 0)
    with pytest.raises(CorruptData, match="unit 3 has to be harvested again"):
        store.read_slice("resid_post.2", 3, 1)


def test_a_truncated_and_a_missing_file_are_found(tmp_path):
    store = predictable.filled(storage.open(tmp_path))
    shard = store.committed()[3].shards["resid_post.2"]
    os.truncate(tmp_path / shard.key, shard.slices[-1].offset + 10)
    with pytest.raises(CorruptData, match="unit 3"):
        store.read_slice("resid_post.2", 3, len(shard.slices) - 1)
    (tmp_path / shard.key).unlink()
    with pytest.raises(CorruptData, match="is gone although unit 3 is committed"):
        store.read_slice("resid_post.2", 3, 0)


def test_a_commit_or_manifest_that_was_changed_or_swapped_is_refused(tmp_path):
    store = predictable.filled(storage.open(tmp_path / "a"))
    other = predictable.filled(storage.open(tmp_path / "b"), seed=4)
    pinned = store.snapshot()
    assert store.snapshot() == pinned  # nothing new: the same version again
    first, second = tmp_path / "a" / format.commit_key(0), tmp_path / "a" / format.commit_key(1)
    good = first.read_bytes()
    first.write_bytes(good.replace(b'"rows":96', b'"rows":95'))
    with pytest.raises(CorruptData, match="does not match its own digest"):
        stores.open(store.storage).committed()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptData, match="belongs to unit 1"):
        stores.open(store.storage).committed()
    first.write_bytes((tmp_path / "b" / format.commit_key(0)).read_bytes())
    with pytest.raises(CorruptData, match=f"of store {other.meta.digest}"):
        stores.open(store.storage).committed()
    first.unlink()
    with pytest.raises(UserError, match=r"1 units missing \(0\)"):
        stores.open(store.storage).pinned(pinned.version)
    predictable.write(stores.open(store.storage), 0)  # harvested again: another attempt, so not what was pinned
    with pytest.raises(UserError, match=r"1 with another commit \(0\)"):
        stores.open(store.storage).pinned(pinned.version)
    (tmp_path / "a" / manifest.manifest_key(1)).write_bytes((tmp_path / "b" / "store.json").read_bytes())
    with pytest.raises((CorruptData, KeyError)):
        stores.open(store.storage).pinned(1)


@pytest.mark.parametrize("same", [True, False])
def test_a_unit_that_was_withdrawn_and_made_again_is_pinned_still_if_its_rows_are_the_same(place, same):
    store = predictable.filled(place)
    pinned = store.snapshot()
    old = store.commit(2)
    verify.withdraw(store, [2])
    fresh = stores.open(place)
    rows = old.rows if same else old.rows - 1
    assert predictable.write(fresh, 2, rows).commit.digest != old.digest
    if same:
        assert fresh.pinned(pinned.version) == pinned
        with Loader(fresh, hooks=Hooks(("resid_post.1",)), batch=32, seed=0, manifest=pinned) as loader:
            assert next(loader).step == 0
    else:
        with pytest.raises(UserError, match=r"1 with another commit \(2\)"):
            fresh.pinned(pinned.version)


def test_a_store_that_may_only_be_read_is_pinned_at_the_readers_own_place(double, tmp_path):
    place, own = storage.open("s3://bucket/store"), storage.open(tmp_path)
    store = predictable.filled(place)
    double.fail("denied", method="PUT", nth=0)
    with pytest.raises(storage.ReadOnlyError):
        store.snapshot()
    pinned = store.snapshot(own)
    assert stores.open(place).pinned(pinned.version, own) == pinned
    assert [entry.key for entry in own.list()] == [manifest.manifest_key(1)] and not list(place.list("manifest/"))


def test_two_snapshots_at_once_get_two_versions(place):
    store = writer.create(place, predictable.meta())
    versions = []
    for unit in range(3):
        predictable.write(store, unit)
        versions.append(store.snapshot().version)
    assert versions == [1, 2, 3]
    assert store.pinned(2).commits.keys() == {0, 1}


def test_a_storage_that_lies_about_conditional_create_is_refused(tmp_path):
    class Liar(storage.LocalStorage):
        def create(self, key, data):
            self.write(key, data)
            return True

    with pytest.raises(storage.StorageError, match="honours If-None-Match"):
        writer.create(Liar(tmp_path), predictable.meta())
