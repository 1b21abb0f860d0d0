"""FORMAT.md says what the code does: its tables are read and held against a store."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae_dist import config, storage
from sae_dist.shards import credits, format, permutation, reader, records, retention, verify
from sae_dist.shards.commits import Commit, Shard
from sae_dist.shards.format import ELEMENTS, StoreMeta
from sae_dist.shards.statistics import Statistics
from tests.shards import predictable

TEXT = (Path(format.__file__).parent / "FORMAT.md").read_text()


def table(first_heading: str) -> dict[str, list[str]]:
    """The table whose first column is headed so: first cell without back-ticks -> the other cells."""
    lines = TEXT[TEXT.index(f"| {first_heading} |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.fixture
def store(tmp_path):
    filled = predictable.filled(storage.open(tmp_path))
    filled.snapshot()
    credits.report(filled.storage, credits.Position("a", 2, 1))
    retention.retire(filled, retention.UntilConsumed())
    verify.withdraw(filled, [4])
    return filled


def test_every_field_is_in_the_specification_and_no_other():
    assert list(table("Field of meta")) == [field.name for field in dataclasses.fields(StoreMeta)]
    assert set(table("Field of a commit")) == {*Commit._fields, "format_version", "statistics"}
    assert list(table("Field of a shard")) == list(Shard._fields)
    assert list(table("Field of the statistics")) == list(Statistics._fields)
    assert f"format version {format.FORMAT_VERSION}" in TEXT.splitlines()[0]


def test_every_key_of_a_store_is_of_a_kind_that_is_specified(store):
    parts = {
        "hook": r"[\w.-]+",
        "unit": r"\d{8}",
        "attempt": "[0-9a-f]{32}",
        "version": r"\d{6}",
        "hash": "[0-9a-f]{32}",
    }
    parts |= {"consumer": r"[\w.-]+", "name": "[0-9a-f]{32}"}
    kinds = {kind: re.sub(r"<(\w+)>", lambda m: parts[m[1]], re.escape(kind)) for kind in table("Key")}
    used = set()
    for entry in store.storage.list():
        matching = [kind for kind, pattern in kinds.items() if re.fullmatch(pattern, entry.key)]
        assert len(matching) == 1, entry.key
        used.add(matching[0])
    assert used == set(kinds) - {"probe/<name>"}


def test_records_are_sealed_as_specified(store):
    record = json.loads(bytes(store.storage.read("commit/00000000.json")))
    assert record.pop("digest") == config.digest(record)
    assert list(record["shards"]["resid_post.1"]) == list(table("Field of a shard"))
    assert list(record["statistics"]["resid_post.1"]) == list(table("Field of the statistics"))
    meta = json.loads(bytes(store.storage.read("store.json")))["meta"]
    name = json.loads(bytes(store.storage.read("store.json")))["name"]
    assert name == config.digest({k: v for k, v in meta.items() if k != "created_by"})[:32] == record["store"]


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_shards_have_the_columns_and_types_that_are_specified(tmp_path, dtype):
    store = predictable.filled(storage.open(tmp_path), dtype=dtype)
    shard = store.commit(1).shards["resid_post.2"]
    with pa.memory_map(str(tmp_path / shard.key)) as source:
        file = pa.ipc.open_file(source)
        schema, batches = file.schema, [file.get_batch(i) for i in range(file.num_record_batches)]
    stored = table("dtype")[dtype][0]
    expected = {name: cells[0] for name, cells in table("Column").items()}
    expected["act"] = f"fixed_size_list<item: {stored}>[{predictable.WIDTH}]"
    if not ELEMENTS[dtype].scaled:
        del expected["scale"]
    assert {field.name: str(field.type) for field in schema} == expected
    assert {key.decode() for key in schema.metadata} == set(re.findall(r"`(sae\.\w+)`", TEXT))
    assert [batch.num_rows for batch in batches] == [ref.rows for ref in shard.slices] == [20, 20, 20, 20, 9]


def test_a_slice_is_read_by_a_stranger_from_the_specification_alone(tmp_path):
    """One range, one hash, one Arrow message; rows scattered by the permutation that the text defines."""
    import xxhash

    store = predictable.filled(storage.open(tmp_path))
    commit = json.loads((tmp_path / "commit" / "00000002.json").read_bytes())
    shard = commit["shards"]["resid_post.1"]
    offset, size, rows, digest = shard["slices"][1]
    data = (tmp_path / shard["key"]).read_bytes()[offset : offset + size]
    assert xxhash.xxh3_128_hexdigest(data) == digest
    batch = pa.ipc.read_record_batch(pa.py_buffer(data), format.schema(store.meta, "resid_post.1"))
    source = predictable.rows_of(2, commit["rows"])
    scatter = permutation.permutation(commit["rows"], permutation.key(store.meta.seed, 2))
    assert batch.num_rows == rows == 20
    assert batch["doc"].to_pylist() == source["doc"][scatter][20:40].tolist()
    bits = batch["act"].values.to_numpy().astype(np.uint32) << 16
    truth = predictable.activation(source["doc"][scatter][20:40], source["pos"][scatter][20:40], 1)
    assert np.array_equal(bits.view(np.float32).reshape(20, -1), truth.numpy())


def test_a_store_of_another_version_is_refused(tmp_path):
    predictable.filled(storage.open(tmp_path))
    record = json.loads((tmp_path / "store.json").read_bytes())
    del record["digest"]
    record["meta"]["format_version"] = 2
    (tmp_path / "store.json").write_bytes(records.seal(record))
    with pytest.raises(config.UserError, match="format_version=2; this sae_dist reads version 1"):
        reader.open(storage.open(tmp_path))
