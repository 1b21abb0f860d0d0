"""What a store is made of: names, store.json, commit/<unit>.json, the Arrow schema. FORMAT.md is the specification."""

import json
import re
from dataclasses import field
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
import torch
import xxhash

from sae_dist import config
from sae_dist.config import UserError, frozen
from sae_dist.storage import Bytes, Storage

FORMAT_VERSION = 1
READS = 3  # of bytes that do not match their checksum, before it is the store that is said to be wrong
DType = Literal["bfloat16", "float16", "float32", "int8", "float8_e4m3"]


class Element(NamedTuple):
    """How one dtype of a store lies in Arrow and in torch."""

    arrow: pa.DataType
    stored: torch.dtype  # of the bytes on disk, one element each
    view: torch.dtype  # of the rows that a reader hands out before any scale is applied
    scaled: bool  # a float32 scale per row: x = scale * stored


ELEMENTS: dict[str, Element] = {
    "bfloat16": Element(pa.uint16(), torch.uint16, torch.bfloat16, False),  # Arrow has no bfloat16
    "float16": Element(pa.float16(), torch.float16, torch.float16, False),
    "float32": Element(pa.float32(), torch.float32, torch.float32, False),
    "int8": Element(pa.int8(), torch.int8, torch.int8, True),
    "float8_e4m3": Element(pa.uint8(), torch.uint8, torch.float8_e4m3fn, True),
}
assert set(ELEMENTS) == set(get_args(DType))

RowPolicy = Literal["drop", "keep"]


class CorruptData(UserError):
    """Stored bytes that are not what their commit says; the message names the unit to harvest again."""


_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,199}")


def checked_name(name: str, what: str) -> str:
    """`name` if it may become part of a key: letters, digits, `_`, `-` and single dots; names come from data."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{what}={name!r} cannot be part of a key; use letters, digits, '_', '-' and single dots")
    return name


@frozen
class StoreMeta:
    """store.json: what the store holds. Its digest names the store; every commit and manifest repeats the digest."""

    model: str  # name of the model, "imported" for activations made elsewhere
    hooks: dict[str, int]  # hook point -> width
    n_units: int
    unit_rows: int  # rows of a full unit; a unit may hold fewer
    heldout_units: int = 0  # the last M units; training never reads them
    slice_rows: int = 8192
    dtype: DType = "bfloat16"
    model_fingerprint: str = ""
    tokenizer: str = ""
    text_fingerprint: str = ""
    context: int = 0  # positions of a sequence; 0 when unknown
    seed: int = 0
    row_policy: RowPolicy = "drop"  # rows with a NaN or an infinity: dropped and counted, or kept and counted
    extra: dict[str, str] = field(
        default_factory=dict
    )  # what else the producer wants to pin, e.g. the slice of the text
    created_by: str = "sae_dist 0.1.0"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for hook, width in self.hooks.items():
            checked_name(hook, "hook")
            if width < 1:
                raise ValueError(f"hooks.{hook}={width}; a width is at least 1")
        if not self.hooks:
            raise ValueError("hooks is empty; name at least one hook point")
        if not 0 <= self.heldout_units < self.n_units:
            raise ValueError(f"heldout_units={self.heldout_units} of n_units={self.n_units}; leave a unit to train on")
        if self.unit_rows < 1 or self.slice_rows < 1:
            raise ValueError(f"unit_rows={self.unit_rows}, slice_rows={self.slice_rows}; both are at least 1")
        if self.unit_rows >= 1 << 32:
            raise ValueError(f"unit_rows={self.unit_rows}; a unit holds fewer than 2^32 rows")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version={self.format_version}; this sae_dist reads version {FORMAT_VERSION}")

    @property
    def train_units(self) -> int:
        return self.n_units - self.heldout_units

    @property
    def element(self) -> Element:
        return ELEMENTS[self.dtype]

    @property
    def digest(self) -> str:
        """Name of the store: the hash of everything in store.json but who created it."""
        return config.digest({k: v for k, v in config.to_dict(self).items() if k != "created_by"})[:32]


class SliceRef(NamedTuple):
    """One record batch of a shard: where its bytes lie and what they hash to."""

    offset: int
    bytes: int
    rows: int
    xxh3_128: str


class Shard(NamedTuple):
    """The file of one hook point in one unit."""

    key: str
    bytes: int
    xxh3_128: str  # of the whole file
    slices: tuple[SliceRef, ...]
    relative_error: float  # sum ||x - stored||^2 / sum ||x||^2, measured when it was written


class Commit(NamedTuple):
    """commit/<unit>.json without the statistics; there is exactly one for a unit."""

    unit: int
    attempt: str
    store: str  # digest of store.json
    rows: int
    dropped: int  # rows left out: not finite, or (of an import) far longer than the others
    shards: dict[str, Shard]
    digest: str  # of the whole record, statistics and all


def commit_key(unit: int) -> str:
    return f"commit/{unit:08d}.json"


def shard_key(hook: str, unit: int, attempt: str) -> str:
    return f"data/{checked_name(hook, 'hook')}/{unit:08d}/{checked_name(attempt, 'attempt')}.arrow"


def retired_key(unit: int) -> str:
    """A marker that the data of a committed unit was deleted by the store's retention."""
    return f"retired/{unit:08d}.json"


def unit_of_commit_key(key: str) -> int | None:
    """7 for commit/00000007.json, None for anything else that lies there."""
    match = re.fullmatch(r"commit/(\d{8,})\.json", key)
    return int(match[1]) if match else None


def seal(record: dict[str, Any]) -> bytes:
    """`record` as JSON that carries the hash of its own content."""
    return json.dumps({**record, "digest": config.digest(record)}, separators=(",", ":")).encode()


def unseal(data: Bytes, what: str) -> dict[str, Any]:
    """The record in `data`, its own `digest` included; raises `CorruptData` when that is not the hash of the rest."""
    try:
        record = json.loads(bytes(data))
        content = {k: v for k, v in record.items() if k != "digest"}
        digest = config.digest(content)
    except (ValueError, AttributeError, RecursionError):
        raise CorruptData(f"{what} is not the JSON record that was written there") from None
    if digest != record.get("digest"):
        raise CorruptData(f"{what} does not match its own digest")
    return record


def read_record(storage: Storage, key: str, what: str) -> dict[str, Any]:
    """The record at `key`; one that does not match its digest is read again, for bits also flip on the way."""
    for _ in range(READS - 1):
        try:
            return unseal(storage.read(key), what)
        except CorruptData:
            continue
    return unseal(storage.read(key), what)


def commit_bytes(commit: Commit, statistics: dict[str, dict[str, Any]]) -> bytes:
    """The commit object: the record, the statistics of every hook and the digest over both."""
    record = commit._asdict() | {"shards": {hook: shard._asdict() for hook, shard in commit.shards.items()}}
    del record["digest"]
    return seal(record | {"format_version": FORMAT_VERSION, "statistics": statistics})


def read_commit(storage: Storage, unit: int, store: str) -> Commit:
    """The commit of `unit` of the store with digest `store`; anything else in its place is refused."""
    record = read_record(storage, commit_key(unit), f"commit of unit {unit}")
    if record["store"] != store or record["unit"] != unit:
        raise CorruptData(
            f"commit of unit {unit} belongs to unit {record['unit']} of store {record['store']}, not to store {store}"
        )
    shards = {
        hook: Shard(**(shard | {"slices": tuple(SliceRef(*ref) for ref in shard["slices"])}))
        for hook, shard in record["shards"].items()
    }
    return Commit(**{name: record[name] for name in Commit._fields if name != "shards"}, shards=shards)


def read_statistics(storage: Storage, unit: int) -> dict[str, dict[str, Any]]:
    """The statistics of `unit` by hook, as statistics.py wrote them."""
    return read_record(storage, commit_key(unit), f"commit of unit {unit}")["statistics"]


def schema(meta: StoreMeta, hook: str) -> pa.Schema:
    """The Arrow schema of a shard of `hook`; the dtype is schema metadata, since Arrow cannot say bfloat16."""
    fields = [pa.field("act", pa.list_(meta.element.arrow, meta.hooks[hook]), nullable=False)]
    if meta.element.scaled:
        fields.append(pa.field("scale", pa.float32(), nullable=False))
    fields += [
        pa.field("doc", pa.uint64(), nullable=False),
        pa.field("pos", pa.uint32(), nullable=False),
        pa.field("token", pa.uint32(), nullable=False),
    ]
    metadata = {"sae.format": str(FORMAT_VERSION), "sae.dtype": meta.dtype, "sae.hook": hook, "sae.store": meta.digest}
    return pa.schema(fields, metadata=metadata)


def xxh3_128(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)
