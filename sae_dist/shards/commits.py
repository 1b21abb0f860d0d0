"""commit/<unit>.json: a unit exists once it has this record. Every field is checked against the store."""

from typing import Annotated, Any, NamedTuple

from pydantic import Field

from sae_dist.config import UserError
from sae_dist.shards import format, records
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.records import CorruptData, Count, Hash
from sae_dist.storage import Bytes, Storage

COMMIT_BYTES = 64 << 20
SLICE_OVERHEAD = 1 << 16  # bytes of a slice besides its rows: Arrow's metadata and padding


class SliceRef(NamedTuple):
    """One record batch of a shard: the place and the hash of its bytes."""

    offset: Count
    bytes: Count
    rows: Count
    xxh3_128: Hash


class ShardFile(NamedTuple):
    """The file of one hook point in one unit."""

    key: str
    bytes: Count
    xxh3_128: Hash  # of the whole file
    slices: tuple[SliceRef, ...]
    relative_error: Annotated[
        float, Field(ge=0, allow_inf_nan=False)
    ]  # sum ||x - stored||^2 / sum ||x||^2, measured when it was written


class Commit(NamedTuple):
    """commit/<unit>.json without the statistics; a unit has exactly one."""

    unit: Count
    attempt: str
    store: str  # digest of store.json
    rows: Count
    dropped: Count  # rows left out: not finite, or (of an import) far longer than the others
    shards: dict[str, ShardFile]
    digest: str  # of the whole record, statistics and all


def to_bytes(commit: Commit, statistics: dict[str, dict[str, Any]]) -> bytes:
    """The commit object: the record, the statistics of every hook and the digest over both."""
    record = commit._asdict() | {"shards": {hook: shard._asdict() for hook, shard in commit.shards.items()}}
    del record["digest"]
    data = records.seal(record | {"format_version": format.FORMAT_VERSION, "statistics": statistics})
    if len(data) > COMMIT_BYTES:
        raise UserError(
            f"the commit of unit {commit.unit} would have {len(data):,} bytes, more than {COMMIT_BYTES:,}; put fewer "
            "hook points into one store, or make slices larger"
        )
    return data


def read_record(storage: Storage, unit: int) -> dict[str, Any]:
    """The commit record of `unit`; only its digest is verified."""
    return records.read(storage, format.commit_key(unit), f"commit of unit {unit}", most=COMMIT_BYTES)


def read(storage: Storage, unit: int, meta: StoreMeta) -> Commit:
    """The commit of `unit`; CorruptData when it belongs to another unit or store, or makes no sense."""
    record, what = read_record(storage, unit), f"commit of unit {unit}"
    fields = {name: value for name, value in record.items() if name not in ("format_version", "statistics")}
    commit = records.checked(Commit, fields, what)
    if commit.store != meta.digest or commit.unit != unit:
        raise CorruptData(f"{what} belongs to unit {commit.unit} of store {commit.store}, not to store {meta.digest}")
    if problem := _problem(commit, meta):
        raise CorruptData(f"{what} makes no sense: {problem}; unit {unit} has to be harvested again")
    return commit


def withdrawn_key(unit: int, data: Bytes) -> str:
    """The key under which a withdrawn commit is kept."""
    return f"withdrawn/{unit:08d}-{format.xxh3_128(data)}.json"


def withdrawn_as(storage: Storage, commit: Commit, digest: str) -> bool:
    """Whether the unit had a withdrawn commit of that digest with the same rows as `commit`."""
    for entry in storage.list(f"withdrawn/{commit.unit:08d}-"):
        try:
            record = records.read(storage, entry.key, entry.key, most=COMMIT_BYTES)
        except CorruptData:
            continue  # a commit may have been withdrawn because it was damaged
        if record["digest"] == digest and _contents(record["shards"]) == _contents(commit._asdict()["shards"]):
            return True
    return False


def _contents(shards: Any) -> dict[str, str]:
    """The hash of every shard: it covers activations, doc, pos and token."""
    return {hook: shard["xxh3_128"] if isinstance(shard, dict) else shard.xxh3_128 for hook, shard in shards.items()}


def _problem(commit: Commit, meta: StoreMeta) -> str:
    """What in a commit contradicts its store, as a clause; '' when nothing does."""
    if commit.rows > meta.unit_rows:
        return f"rows={commit.rows} of unit_rows={meta.unit_rows}"
    if commit.shards.keys() != meta.hooks.keys():
        return f"shards of {', '.join(commit.shards)} instead of {', '.join(meta.hooks)}"
    full, rest = divmod(commit.rows, meta.slice_rows)
    for hook, shard in commit.shards.items():
        if shard.key != format.shard_key(hook, commit.unit, commit.attempt):
            return f"shards.{hook}.key={shard.key!r}"
        rows = [ref.rows for ref in shard.slices]
        if len(rows) != full + (rest > 0) or set(rows[:full]) - {meta.slice_rows} or rows[full:] not in ([], [rest]):
            return f"shards.{hook}.slices do not hold {commit.rows} rows, {meta.slice_rows} each"
        for number, ref in enumerate(shard.slices):
            if ref.offset + ref.bytes > shard.bytes or ref.bytes > ref.rows * meta.row_bytes + SLICE_OVERHEAD:
                return f"shards.{hook}.slices.{number} has {ref.bytes} bytes from {ref.offset} of {shard.bytes}"
    return ""
