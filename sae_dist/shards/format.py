"""What a store is made of: names, keys, store.json, the Arrow schema. FORMAT.md is the specification."""

import re
from dataclasses import field
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
import torch
import xxhash

from sae_dist import config
from sae_dist.config import UserError, frozen
from sae_dist.shards import records

FORMAT_VERSION = 1
MAX_UNITS, MAX_WIDTH, MAX_HOOKS = 1 << 22, 1 << 20, 4096  # beyond these a record is taken for damaged
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

NonfiniteRows = Literal["drop", "keep"]


_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,199}")


def checked_name(name: str, what: str) -> str:
    """`name` if it may be part of a key: letters, digits, `_`, `-` and single dots; else UserError."""
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
    row_policy: NonfiniteRows = "drop"  # rows with a NaN or an infinity: dropped and counted, or kept and counted
    extra: dict[str, str] = field(
        default_factory=dict
    )  # what else the producer wants to pin, e.g. the slice of the text
    created_by: str = "sae_dist 0.1.0"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for hook, width in self.hooks.items():
            checked_name(hook, "hook")
            if not 1 <= width <= MAX_WIDTH:
                raise ValueError(f"hooks.{hook}={width}; a width is 1 to {MAX_WIDTH:,}")
        if not 1 <= len(self.hooks) <= MAX_HOOKS:
            raise ValueError(f"hooks names {len(self.hooks)} hook points; name 1 to {MAX_HOOKS:,}")
        if self.n_units > MAX_UNITS:
            raise ValueError(f"n_units={self.n_units}; a store has at most {MAX_UNITS:,}: make unit_rows larger")
        if self.context < 0:
            raise ValueError(f"context={self.context}; 0 when it is unknown")
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
    def row_bytes(self) -> int:
        """Of the widest hook point: the activation, its scale, doc, pos and token."""
        return max(self.hooks.values()) * self.element.stored.itemsize + 4 * self.element.scaled + 16

    @property
    def digest(self) -> str:
        """Name of the store: the hash of everything in store.json but who created it."""
        return config.digest({k: v for k, v in config.to_dict(self).items() if k != "created_by"})[:32]


def commit_key(unit: int) -> str:
    return f"commit/{unit:08d}.json"


def shard_key(hook: str, unit: int, attempt: str) -> str:
    return f"data/{checked_name(hook, 'hook')}/{unit:08d}/{checked_name(attempt, 'attempt')}.arrow"


def retired_key(unit: int) -> str:
    """The key of the marker that retention deleted the data of a committed unit."""
    return f"retired/{unit:08d}.json"


def manifest_bytes(meta: StoreMeta) -> int:
    """An upper bound on the size of a manifest of that store."""
    return records.SMALL_BYTES + 128 * meta.n_units


def unit_of_commit_key(key: str) -> int | None:
    """7 for commit/00000007.json, None for any other key."""
    match = re.fullmatch(r"commit/([0-9]{8,})\.json", key)
    return int(match[1]) if match else None


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
