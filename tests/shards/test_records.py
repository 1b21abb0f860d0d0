"""Whatever the records of a store say, it is read or refused in one line, in the memory of a store that is whole."""

import json
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from sae_dist import storage
from sae_dist.config import UserError, digest
from sae_dist.shards import consumers, format, records, retention, stores, summary, verify
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.loader import Loader
from sae_dist.shards.records import CorruptData
from tests.memory_storage import MemoryStorage
from tests.shards import predictable

SENSELESS = (None, -1, 10**13, "x", 1e308, float("nan"), [], {}, [1, 2, 3, 4])
KEYS = ("store.json", "commit/00000002.json", "manifest/v000001.json", "consumers/a.json")


def use(place) -> None:
    """What commands do with a store."""
    store = stores.open(place)
    store.snapshot()
    store.pinned(1)
    summary.summarize(store)
    summary.statistics(store)
    verify.verify(store)
    retention.retire(store, retention.UntilConsumed(margin_units=100))
    with Loader(store, hooks=Hooks(("resid_post.1",)), batch=400, seed=0) as loader:
        next(loader)


def changed(record: Any) -> Iterator[Any]:
    """The record with one field after the other replaced, or gone."""
    if isinstance(record, dict | list):
        for place in list(record) if isinstance(record, dict) else range(min(len(record), 2)):
            for value in (*changed(record[place]), *SENSELESS):
                yield (
                    type(record)(record) | {place: value}
                    if isinstance(record, dict)
                    else [value if i == place else old for i, old in enumerate(record)]
                )
            if isinstance(record, dict):
                yield {name: value for name, value in record.items() if name != place}


@pytest.mark.parametrize("key", KEYS)
def test_records_with_senseless_fields_are_one_line_or_harmless(key):
    place = MemoryStorage(f"senseless-{key}")
    store = predictable.filled(place, hooks={"resid_post.1": 16}, n_units=4)
    store.snapshot()
    consumers.report(place, consumers.ConsumerPosition("a", taken=3, saved=2))
    use(place)
    good = bytes(place.read(key))
    record = {name: value for name, value in json.loads(good).items() if name != "digest"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number, senseless in enumerate(changed(record)):
        if key == "store.json" and isinstance(senseless.get("meta"), dict):  # a name that fits: the field is at fault
            named = {name: value for name, value in senseless["meta"].items() if name != "created_by"}
            senseless |= {"name": digest(named)[:32]}
        place.write(key, records.seal(senseless))
        try:
            use(place)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, (number, senseless)
    place.write(key, good)
    use(place)
    assert refused > 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"7", b'{"digest": 1e999}', b'{"a": "\\ud800"}', b"\xff"])
def test_records_that_are_no_records_are_one_line(tmp_path, key, content):
    place = storage.open(tmp_path)
    predictable.filled(place, n_units=4).snapshot()
    consumers.report(place, consumers.ConsumerPosition("a", taken=3, saved=2))
    place.write(key, content)
    with pytest.raises(CorruptData, match=key.partition(".")[0] if "commit" not in key else "commit of unit 2"):
        use(place)


@pytest.mark.parametrize("key", KEYS)
def test_a_record_of_many_gigabytes_is_not_read(tmp_path, key):
    place = storage.open(tmp_path)
    predictable.filled(place, n_units=4).snapshot()
    consumers.report(place, consumers.ConsumerPosition("a", taken=3, saved=2))
    with (tmp_path / key).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptData, match="is larger than"):
        use(place)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


def test_a_slice_with_the_right_hash_and_senseless_bytes_is_one_line(tmp_path):
    place = storage.open(tmp_path)
    store = predictable.filled(place, hooks={"resid_post.1": 16}, n_units=4)
    shard = store.commit(1).shards["resid_post.1"]
    data = bytearray(place.read(shard.key))
    ref = shard.slices[0]
    data[ref.offset : ref.offset + 200] = bytes(200)
    place.write(shard.key, data)
    record = json.loads(bytes(place.read(format.commit_key(1))))
    del record["digest"]
    part = record["shards"]["resid_post.1"]["slices"][0]
    part[3] = format.xxh3_128(bytes(data[ref.offset : ref.offset + ref.bytes]))
    place.write(format.commit_key(1), records.seal(record))
    with pytest.raises(CorruptData, match="slice 0 is no record batch of 20 rows"):
        stores.open(place).read_slice("resid_post.1", 1, 0)
