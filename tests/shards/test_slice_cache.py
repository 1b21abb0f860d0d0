"""The cache is never believed, is shared by jobs, and a full disk costs speed only."""

import itertools
import json
import logging
import os
import resource

import pytest
import torch

from sae_dist import storage
from sae_dist.cli.main import main
from sae_dist.shards import reader, stores
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.slice_cache import SliceCache
from tests.shards import children, predictable

HOOK = "resid_post.1"


@pytest.fixture
def remote(double):
    store = predictable.filled(storage.open("s3://bucket/store"))
    double.requests.clear()
    return store.storage


def cached(remote, folder, limit: int = 1 << 30) -> reader.Store:
    return stores.open(remote, cache=SliceCache(folder, limit_bytes=limit))


def hashes(store, n: int = 14) -> list[int]:
    order = OrderConfig(lanes=2, window=2)
    with Loader(
        store, hooks=Hooks((HOOK,)), batch=32, seed=1, order=order, stop_step=n
    ) as loader:  # no read is left under way
        batches = list(loader)
    assert all(predictable.is_true(HOOK, b.x, b.doc, b.pos) for b in batches)
    return [b.order_hash for b in batches]


def data_reads(double) -> int:
    return sum(1 for method, key in double.log if method == "GET" and key.startswith("store/data/"))


def n_slices(store, *, heldout: bool = False) -> int:
    units = store.meta.n_units if heldout else store.meta.train_units
    return sum(len(store.commit(unit).shards[HOOK].slices) for unit in range(units))


def test_each_slice_is_read_from_the_store_once_however_many_loaders_read_it(remote, double, tmp_path):
    plain = hashes(stores.open(remote))
    double.log.clear()
    store = cached(remote, tmp_path)
    assert [hashes(store), hashes(cached(remote, tmp_path)), hashes(store)] == [plain] * 3
    assert data_reads(double) == n_slices(store)


def train(store: str, out, *more: str) -> int:
    """Three epochs of the five training units."""
    return main([
        "train", f"store={store}", f"out={out}", f"hook={HOOK}", "sae.n_latents=32", "sae.k=4", "train.tokens=1230",
        "train.batch=41", "train.init_rows=64", "wandb.mode=disabled", *more,
    ])  # fmt: skip


def test_later_epochs_of_a_training_read_nothing_from_the_store_and_its_result_is_the_same(remote, double, tmp_path):
    slices, reads = n_slices(stores.open(remote), heldout=True), {}
    for name, keys in {"cached": [f"train.cache={tmp_path}/cache", "train.cache_gb=0.001"], "plain": []}.items():
        double.log.clear()
        assert train(remote.uri, tmp_path / name, *keys) == 0
        reads[name] = data_reads(double)
    assert reads["cached"] == slices < reads["plain"]  # held-out ones are read once, to judge the dictionary
    cached, plain = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("cached", "plain"))
    assert cached["config_hash"] == plain["config_hash"] and cached["order_hash"] == plain["order_hash"]
    weights = [tmp_path / name / "dictionary" / "dictionary.safetensors" for name in reads]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "keys, words",
    [
        (["train.cache=cache"], "is a local folder already; set train.cache=null"),
        (["train.cache_gb=3"], "train.cache_gb=3.0 without train.cache"),
        (["train.cache=s3://bucket/cache"], "train.cache=s3://bucket/cache is not a folder on a disk"),
    ],
)
def test_a_cache_that_would_be_of_no_use_is_refused(tmp_path, capsys, keys, words):
    assert train(str(tmp_path / "store"), tmp_path / "run", *keys) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1, said


@pytest.mark.slow
def test_two_processes_share_a_cache_and_read_each_slice_once(remote, double, tmp_path):
    reports = [str(tmp_path / name) for name in ("a", "b")]
    cache = str(tmp_path / "cache")
    jobs = [children.start(children.consume, remote.uri, r, 12, 0, 0, 0, 1, cache) for r in reports]
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert children.told(reports[0]) == children.told(reports[1]) and len(children.told(reports[0])) == 12
    reads = [key for method, key in double.log if method == "GET" and key.startswith("store/data/")]
    files = list((tmp_path / "cache").glob("??/*.slice"))
    assert len(reads) == len(files) > 0


def test_a_cached_file_that_rotted_is_found_dropped_and_read_again(remote, double, tmp_path):
    before = hashes(cached(remote, tmp_path))
    files = sorted(tmp_path.glob("??/*.slice"))
    flipped, cut, emptied = files[0], files[1], files[2]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 8
    flipped.write_bytes(data)
    os.truncate(cut, 100)
    os.truncate(emptied, 0)
    double.log.clear()
    store = cached(remote, tmp_path)
    assert hashes(store) == before
    assert store.cache.counts["dropped"] == 3 and data_reads(double) == 3
    assert flipped.read_bytes() != bytes(data)


def test_eviction_keeps_the_limit_and_mapped_slices_alive(remote, tmp_path):
    store = cached(remote, tmp_path)
    part = store.read_slice(HOOK, 0, 0)
    size = max(path.stat().st_size for path in tmp_path.glob("??/*.slice"))
    small = cached(remote, tmp_path, limit=3 * size)
    for unit, index in itertools.product(range(5), range(3)):
        small.read_slice(HOOK, unit, index)
    used = sum(path.stat().st_size for path in tmp_path.glob("??/*.slice"))
    assert used <= 3 * size and small.cache.counts["evicted"] >= 10
    assert not store.cache._path(store.commit(0).shards[HOOK].slices[0]).exists()
    assert predictable.is_true(HOOK, part.x, part.doc, part.pos)  # evicted by the other job, still whole for this one


def test_files_that_are_not_the_caches_stay_however_old_they_are(remote, tmp_path):
    others = [tmp_path / "my" / "notes.txt", tmp_path / "my" / "pear.slice", tmp_path / "my" / ".hidden"]
    (tmp_path / "my").mkdir()
    for path in others:
        path.write_text("mine")
        os.utime(path, (1000, 1000))
    begun = tmp_path / "my" / f".{'0' * 32}"  # by a writer that was killed
    begun.write_bytes(b"half")
    os.utime(begun, (1000, 1000))
    small = cached(remote, tmp_path, limit=2000)
    for index in range(4):
        small.read_slice(HOOK, 0, index)
    assert small.cache.counts["evicted"] > 1 and not begun.exists()
    assert [path.read_text() for path in others] == ["mine"] * 3


def test_the_least_recently_used_goes_first(remote, tmp_path):
    store = cached(remote, tmp_path)
    refs = [ref for unit in range(2) for ref in store.commit(unit).shards[HOOK].slices[:4]]
    for index in range(8):
        store.read_slice(HOOK, index // 4, index % 4)
    for age, ref in enumerate(refs):
        os.utime(store.cache._path(ref), (1000 + age, 1000 + age))
    store.read_slice(HOOK, 0, 0)  # used again just now
    store.cache.limit_bytes = sum(ref.bytes for ref in refs)
    store.read_slice(HOOK, 2, 0)
    assert store.cache._path(refs[0]).exists() and not store.cache._path(refs[1]).exists()


def test_a_full_disk_costs_speed_only(remote, double, tmp_path, caplog):
    store = cached(remote, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # every write beyond 100 bytes fails, as on a full disk
    try:
        with caplog.at_level(logging.WARNING):
            part = store.read_slice(HOOK, 0, 0)
            again = store.read_slice(HOOK, 0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert predictable.is_true(HOOK, part.x, part.doc, part.pos) and torch.equal(part.x, again.x)
    assert store.cache.counts["uncached"] == 2
    assert [r.message for r in caplog.records if "File too large even when empty" in r.message] != []
    assert list(tmp_path.glob("??/*")) == []
