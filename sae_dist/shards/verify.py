"""Reads every byte of a store against its checksums and says which units have to be harvested again."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import xxhash

from sae_dist.config import UserError
from sae_dist.progress import logged
from sae_dist.shards import commits as commit_files
from sae_dist.shards import format
from sae_dist.shards.commits import Commit, ShardFile
from sae_dist.shards.memory_map import map_bytes
from sae_dist.shards.reader import Store
from sae_dist.shards.records import CorruptData

CHUNK_BYTES = 32 << 20


class BadObject(NamedTuple):
    """An object that does not match its commit."""

    unit: int
    key: str
    problem: str


class Verification(NamedTuple):
    """The result of `verify`. `missing` units were never committed, which is no error; `retired` ones have no data."""

    units: int
    bytes: int
    bad: list[BadObject]
    missing: list[int]
    retired: list[int]

    @property
    def harvest_again(self) -> list[int]:
        return sorted({bad.unit for bad in self.bad})


def verify(store: Store, *, threads: int = 4) -> Verification:
    """Reads every shard of every unit and compares its size and hash."""
    commits: dict[int, Commit] = {}
    bad: list[BadObject] = []
    listed = {format.unit_of_commit_key(entry.key) for entry in store.storage.list("commit/")}
    for unit in sorted(unit for unit in listed if unit is not None):
        try:
            commit = store.commit(unit)
        except CorruptData as error:
            bad.append(BadObject(unit, format.commit_key(unit), str(error)))
            continue
        if commit is not None:
            commits[unit] = commit
    gone = {entry.key for entry in store.storage.list("retired/")}
    retired = [unit for unit in commits if format.retired_key(unit) in gone]
    jobs = [
        (unit, shard) for unit, commit in commits.items() if unit not in retired for shard in commit.shards.values()
    ]
    with ThreadPoolExecutor(threads) as pool:
        problems = logged(pool.map(lambda job: _problem(store, job[1]), jobs), "verified", len(jobs), of="files")
        bad += [
            BadObject(unit, shard.key, problem)
            for (unit, shard), problem in zip(jobs, problems, strict=True)
            if problem
        ]
    missing = [unit for unit in range(store.meta.n_units) if unit not in listed]
    return Verification(len(commits), sum(shard.bytes for _, shard in jobs), bad, missing, retired)


def withdraw(store: Store, units: Iterable[int]) -> None:
    """Deletes the commits of `units`, so that they can be harvested again; copies are kept under withdrawn/.

    Runs that pinned the old commits accept new ones with the same rows and refuse others.
    """
    for unit in units:
        try:
            data = store.storage.read(format.commit_key(unit), 0, commit_files.COMMIT_BYTES)
        except FileNotFoundError:
            raise UserError(
                f"unit={unit} of {store.storage.uri} is not committed; there is nothing to withdraw"
            ) from None
        store.storage.write(commit_files.withdrawn_key(unit, data), data)
        store.storage.delete(format.commit_key(unit))


def _problem(store: Store, shard: ShardFile) -> str:
    """How the shard differs from its commit; '' if it does not."""
    try:
        size = store.storage.size(shard.key)
        if size != shard.bytes:
            return f"{size} bytes instead of {shard.bytes}"
        whole = xxhash.xxh3_128()
        path = store.storage.local_path(shard.key)
        for start in range(0, size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size - start)
            data = map_bytes(path, start, length).data if path else store.storage.read(shard.key, start, length)
            whole.update(data)
    except FileNotFoundError:
        return "gone"
    return "" if whole.hexdigest() == shard.xxh3_128 else f"xxh3-128 {whole.hexdigest()} instead of {shard.xxh3_128}"
