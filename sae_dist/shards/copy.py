"""Copies a store from one storage to another, unit by unit and verified; run it again to resume."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from sae_dist import faults
from sae_dist.config import UserError
from sae_dist.progress import logged
from sae_dist.shards import format, records, writer
from sae_dist.shards.commits import COMMIT_BYTES, Commit, ShardFile
from sae_dist.shards.reader import Store
from sae_dist.shards.records import CorruptData
from sae_dist.storage import Bytes, Storage


class Copied(NamedTuple):
    """What one call did; `skipped` units were there before, `retired` units have no data."""

    units: int
    bytes: int
    skipped: int
    retired: int


def copy(source: Store, target: Storage, *, threads: int = 4) -> Copied:
    """Copies every committed unit of `source` to `target`, with equal keys and commits: manifests stay valid."""
    there = writer.create(target, source.meta)
    commits, done = source.committed(), there.committed()
    for unit, commit in commits.items():
        if unit in done and done[unit].digest != commit.digest:
            raise UserError(
                f"unit={unit} was harvested independently into {target.uri}; copy into an empty place instead"
            )
    gone = {entry.key for entry in source.storage.list("retired/")}
    retired = [unit for unit in commits if format.retired_key(unit) in gone]
    todo = [commit for unit, commit in commits.items() if unit not in done and unit not in retired]
    with ThreadPoolExecutor(threads) as pool:
        copying = pool.map(lambda commit: _copy_unit(source, target, commit), todo)
        sizes = list(logged(copying, "copied", len(todo)))
    for entry in source.storage.list("manifest/"):
        target.create(entry.key, _record(source.storage, entry.key, format.manifest_bytes(source.meta)))
    return Copied(len(todo), sum(sizes), len(commits) - len(todo) - len(retired), len(retired))


def _copy_unit(source: Store, target: Storage, commit: Commit) -> int:
    """Copies the shards, reads each back from the target, then copies the commit."""
    for shard in commit.shards.values():
        target.write(shard.key, _verified(source.storage, commit.unit, shard))
        _verified(target, commit.unit, shard)
        faults.point("copy.after_shard", unit=commit.unit, key=shard.key)
    key = format.commit_key(commit.unit)
    target.create(key, _record(source.storage, key, COMMIT_BYTES))
    return sum(shard.bytes for shard in commit.shards.values())


def _record(storage: Storage, key: str, most: int) -> bytes:
    record = records.read(storage, key, f"{storage.uri}/{key}", most=most)
    return records.seal({name: value for name, value in record.items() if name != "digest"})


def _verified(storage: Storage, unit: int, shard: ShardFile) -> Bytes:
    """The whole shard, verified; read again if it is wrong, as bits may flip in transfer."""
    for _ in range(records.READ_TRIES):
        try:
            data = storage.read(shard.key)
        except FileNotFoundError:
            raise CorruptData(f"{storage.uri}/{shard.key} is gone although unit {unit} is committed") from None
        if len(data) == shard.bytes and format.xxh3_128(data) == shard.xxh3_128:
            return data
    raise CorruptData(f"{storage.uri}/{shard.key} does not match its checksum; unit {unit} has to be harvested again")
