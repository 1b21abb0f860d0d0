"""A stranger's reader of stores: it takes from FORMAT.md what may lie there, and reads rows by those words alone."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

import sae_dist.shards

TEXT = (Path(sae_dist.shards.__file__).parent / "FORMAT.md").read_text()


def table(first_heading: str) -> dict[str, list[str]]:
    """The table whose first column is headed so: first cell without back-ticks -> the other cells."""
    lines = TEXT[TEXT.index(f"| {first_heading} |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def kind(key: str) -> str:
    """The row of the table of keys that describes an object, exactly one."""
    forms = {part: cells[0].strip("`") for part, cells in table("Part of a key").items()}
    parts = re.compile("|".join(map(re.escape, forms)))
    found = []
    for row in table("Key"):
        literal, placed = parts.split(row), parts.findall(row)
        pattern = "".join(re.escape(text) + f"(?:{forms[part]})" for text, part in zip(literal, placed, strict=False))
        if re.fullmatch(pattern + re.escape(literal[-1]), key):
            found.append(row)
    assert len(found) == 1, f"{key} is described by {found}"
    return found[0]


def digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def record(folder: Path, key: str) -> dict[str, Any]:
    """The record at `key`, sealed and with the fields that its table names."""
    content = json.loads((folder / key).read_bytes())
    assert content.pop("digest") == digest(content), key
    assert set(content) == set(table(f"Field of {table('Key')[kind(key)][1]}")), key
    return content


def objects(folder: Path) -> set[str]:
    """Every object of the store is described, and so is all that is in the records; the kinds that there are."""
    kinds = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        key = path.relative_to(folder).as_posix()
        kinds.add(kind(key))
        if table("Key")[kind(key)][1]:
            content = record(folder, key)
            for shard in content.get("shards", {}).values():
                assert set(shard) == set(table("Field of a shard"))
            for statistics in content.get("statistics", {}).values():
                assert set(statistics) == set(table("Field of the statistics"))
    store = record(folder, "store.json")
    assert set(store["meta"]) == set(table("Field of meta"))
    assert store["name"] == digest({k: v for k, v in store["meta"].items() if k != "created_by"})[:32]
    return kinds


class Rows(NamedTuple):
    """The rows of a shard, in the order stored."""

    x: np.ndarray  # float32 [rows, width]
    doc: np.ndarray  # [rows]
    pos: np.ndarray
    token: np.ndarray


def rows(folder: Path, hook: str, unit: int) -> Rows:
    """All slices of a shard of bfloat16 or float32, each read as a range of bytes and held against its hash."""
    store = record(folder, "store.json")
    dtype, commit = store["meta"]["dtype"], record(folder, f"commit/{unit:08d}.json")
    shard = commit["shards"][hook]
    assert commit["store"] == store["name"] and commit["unit"] == unit
    assert kind(shard["key"]).startswith("data/") and f"/{commit['attempt']}." in shard["key"]
    data = (folder / shard["key"]).read_bytes()
    assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (shard["bytes"], shard["xxh3_128"])
    schema = pa.ipc.open_file(pa.py_buffer(data)).schema
    assert {field.name: str(field.type) for field in schema} == columns(dtype, store["meta"]["hooks"][hook])
    batches = []
    for offset, size, n, checksum in shard["slices"]:
        part = data[offset : offset + size]
        assert xxhash.xxh3_128_hexdigest(part) == checksum
        batches.append(pa.ipc.read_record_batch(pa.py_buffer(part), schema))
        assert batches[-1].num_rows == n
    whole = pa.Table.from_batches(batches).combine_chunks()
    assert len(whole) == commit["rows"]
    act = whole["act"].combine_chunks().values.to_numpy()
    x = (act.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else act
    return Rows(x.reshape(len(whole), -1), *(whole[name].to_numpy() for name in ("doc", "pos", "token")))


def columns(dtype: str, width: int) -> dict[str, str]:
    """The columns of a shard and their Arrow types."""
    stored, read_as = table("dtype")[dtype]
    types = {name: cells[0] for name, cells in table("Column").items()}
    types["act"] = f"fixed_size_list<item: {stored}>[{width}]"
    return {name: kind for name, kind in types.items() if name != "scale" or read_as.startswith("scale *")}


def scatter(n: int, seed: int, unit: int) -> list[int]:
    """p: row i of a shard is row p[i] of what was computed."""
    k = 0
    for part in (seed, unit):
        k = _mix64(k ^ part)
    low = (1 << (n - 1).bit_length()) - 1
    return sorted(range(n), key=lambda i: (_mix64(i ^ k) & ~low) | i)


def _mix64(word: int) -> int:
    gamma, first, second = (int(number, 16) for number in re.findall(r"0x[0-9A-F]{16}", TEXT))
    z = (word + gamma) % 2**64
    z = (z ^ (z >> 30)) * first % 2**64
    z = (z ^ (z >> 27)) * second % 2**64
    return z ^ (z >> 31)
