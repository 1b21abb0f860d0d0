"""An open store: its commits and its slices, each verified against its checksum before anybody sees a row."""

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Shaped, UInt8, UInt32, UInt64
from torch import Tensor

from sae_dist import config
from sae_dist.config import UserError
from sae_dist.shards import format, manifest, quantize, statistics
from sae_dist.shards.cache import FolderCache
from sae_dist.shards.format import Commit, CorruptData, SliceRef, StoreMeta
from sae_dist.shards.manifest import Manifest
from sae_dist.shards.mapped import map_bytes
from sae_dist.shards.statistics import Statistics
from sae_dist.storage import Storage

PARALLEL_COMMITS = 16  # small objects, so latency counts
_F4 = np.dtype("<f4")
_IDS = (("doc", np.dtype("<u8")), ("pos", np.dtype("<u4")), ("token", np.dtype("<u4")))


class Slice(NamedTuple):
    """The rows of one record batch; `bits` is a view of the file (or of the bytes that came), not a copy."""

    bits: Shaped[Tensor, "rows width"]
    scale: Float[Tensor, " rows"] | None
    doc: UInt64[np.ndarray, " rows"]
    pos: UInt32[np.ndarray, " rows"]
    token: UInt32[np.ndarray, " rows"]
    dtype: format.DType

    @property
    def x(self) -> Shaped[Tensor, "rows width"]:
        """The activations: a view for plain dtypes, dequantised to bfloat16 for int8 and fp8."""
        return quantize.decode(self.bits, self.scale, self.dtype)


class Rows(NamedTuple):
    """Consecutive rows of one unit, as `heldout` hands them out."""

    x: Shaped[Tensor, "rows width"]
    doc: UInt64[np.ndarray, " rows"]
    pos: UInt32[np.ndarray, " rows"]
    token: UInt32[np.ndarray, " rows"]
    unit: int


class Store:
    """A store that is open for reading, and for writing through writer.py. Safe to use from several threads."""

    def __init__(self, storage: Storage, meta: StoreMeta, *, cache: FolderCache | None = None):
        self.storage = storage
        self.meta = meta
        self.cache = cache
        self._commits: dict[int, Commit] = {}
        self._schemas = {hook: format.schema(meta, hook) for hook in meta.hooks}
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def scratch(self, size: int) -> UInt8[np.ndarray, " size"]:
        """Room for a shard, this thread's own and the same each time: fresh pages cost more than filling them."""
        room = getattr(self._scratch, "room", None)
        if room is None or len(room) < size:
            room = self._scratch.room = np.empty(size, np.uint8)
        return room[:size]

    def commit(self, unit: int) -> Commit | None:
        """The commit of `unit`, None while there is none; commits never change, so each is fetched once."""
        known = self._commits.get(unit)
        if known is not None:
            return known
        try:
            commit = format.read_commit(self.storage, unit, self.meta.digest)
        except FileNotFoundError:
            return None
        with self._lock:
            return self._commits.setdefault(unit, commit)

    def committed(self) -> dict[int, Commit]:
        """Every commit that is there now, by unit."""
        listed = (format.unit_of_commit_key(entry.key) for entry in self.storage.list("commit/"))
        units = sorted(unit for unit in listed if unit is not None and unit < self.meta.n_units)
        with ThreadPoolExecutor(PARALLEL_COMMITS) as pool:
            commits = pool.map(self.commit, units)
        return {unit: commit for unit, commit in zip(units, commits, strict=True) if commit is not None}

    def snapshot(self) -> Manifest:
        """The commits of now as an immutable manifest; the newest one again if it says the same."""
        return manifest.write(self.storage, self.meta.digest, self.committed())

    def pinned(self, version: int) -> Manifest:
        """Manifest `version`, after checking that the store still holds every commit that it names."""
        pinned = manifest.read(self.storage, self.meta.digest, version)
        manifest.check(pinned, self.committed(), place=self.storage.uri)
        return pinned

    def read_slice(self, hook: str, unit: int, index: int) -> Slice:
        """Slice `index` of `unit`, its bytes verified; `CorruptData` if they are wrong however often they are read."""
        commit = self.commit(unit)
        if commit is None:
            raise UserError(f"unit={unit} of {self.storage.uri} is not committed; harvest it first")
        if hook not in commit.shards:
            raise UserError(f"hook={hook} is not in {self.storage.uri}; it has {', '.join(self.meta.hooks)}")
        shard = commit.shards[hook]
        ref = shard.slices[index]
        try:
            data = self._bytes(shard.key, ref)
        except FileNotFoundError:
            raise self._missing(unit, shard.key) from None
        if data is None:
            raise CorruptData(
                f"{self.storage.uri}/{shard.key} slice {index} does not match its checksum {ref.xxh3_128}; "
                f"unit {unit} has to be harvested again (sae-dist store verify lists all such units)"
            )
        return _parse(data, self._schemas[hook], self.meta.dtype, self.meta.hooks[hook])

    def _bytes(self, key: str, ref: SliceRef) -> UInt8[np.ndarray, " bytes"] | None:
        """The verified bytes of a slice, None if wrong each time."""

        def fetch() -> UInt8[np.ndarray, " bytes"]:
            return _fetch(self.storage, key, ref)

        cache = self.cache if self.storage.local_path(key) is None else None
        for _ in range(format.READS):
            data = fetch() if cache is None else cache.get(ref, fetch)
            if len(data) == ref.bytes and format.xxh3_128(data) == ref.xxh3_128:
                return data
            if cache is not None:
                cache.drop(ref)
        return None

    def _missing(self, unit: int, key: str) -> UserError:
        if self.storage.exists(format.retired_key(unit)):
            return UserError(
                f"unit={unit} of {self.storage.uri} was retired after its last registered consumer; "
                "harvest it into a new store, or keep units with retention=keep"
            )
        return CorruptData(f"{self.storage.uri}/{key} is gone although unit {unit} is committed; harvest it again")

    def statistics(self, hook: str, units: int | None = None) -> Statistics:
        """Merged statistics of the first `units` training units (default: all that are committed), by unit."""
        chosen = range(self.meta.train_units if units is None else min(units, self.meta.train_units))
        parts = [part for part in (self.unit_statistics(unit, hook) for unit in chosen) if part is not None]
        return statistics.merged(parts) if parts else statistics.empty(self.meta.hooks[hook])

    def unit_statistics(self, unit: int, hook: str) -> Statistics | None:
        try:
            return statistics.from_json(format.read_statistics(self.storage, unit)[hook])
        except FileNotFoundError:
            return None


def open(storage: Storage, *, cache: FolderCache | None = None) -> Store:
    """The store at `storage`; `UserError` if there is none."""
    try:
        record = format.read_record(storage, "store.json", f"{storage.uri}/store.json")
    except FileNotFoundError:
        raise UserError(f"store={storage.uri} holds no store.json; harvest or import into it first") from None
    meta = config.load(StoreMeta, record["meta"])
    if meta.digest != record["name"]:
        raise CorruptData(f"{storage.uri}/store.json names itself {record['name']} but its content is {meta.digest}")
    return Store(storage, meta, cache=cache)


def heldout(store: Store, hook: str, batch_rows: int) -> Iterator[Rows]:
    """The rows of the held-out units in the order stored, at most `batch_rows` at a time, none across two units."""
    for unit in range(store.meta.train_units, store.meta.n_units):
        yield from unit_rows(store, hook, unit, batch_rows)


def unit_rows(store: Store, hook: str, unit: int, batch_rows: int) -> Iterator[Rows]:
    """The rows of one unit in the order stored."""
    commit = store.commit(unit)
    if commit is None:
        raise UserError(f"unit={unit} of {store.storage.uri} is not committed; harvest it first")
    for index in range(len(commit.shards[hook].slices)):
        part = store.read_slice(hook, unit, index)
        for start in range(0, len(part.doc), batch_rows):
            rows = slice(start, start + batch_rows)
            scale = None if part.scale is None else part.scale[rows]
            x = quantize.decode(part.bits[rows], scale, part.dtype)
            yield Rows(x, part.doc[rows], part.pos[rows], part.token[rows], unit)


def _fetch(storage: Storage, key: str, ref: SliceRef) -> UInt8[np.ndarray, " bytes"]:
    path = storage.local_path(key)
    if path is None:
        data = storage.read(key, ref.offset, ref.bytes)
        return np.frombuffer(bytearray(data) if isinstance(data, bytes) else data, np.uint8)  # writable, for torch
    return map_bytes(path, ref.offset, ref.bytes)


def _parse(data: UInt8[np.ndarray, " bytes"], schema: pa.Schema, dtype: format.DType, width: int) -> Slice:
    message = pa.ipc.read_message(pa.BufferReader(pa.py_buffer(data)))
    batch = pa.ipc.read_record_batch(message, schema)
    base = data.__array_interface__["data"][0]

    def column(array: pa.Array, numpy_dtype: np.dtype, count: int) -> np.ndarray:
        start = array.buffers()[-1].address - base  # by address: a view through Arrow would be read-only
        return data[start : start + count * numpy_dtype.itemsize].view(numpy_dtype)

    element, rows = format.ELEMENTS[dtype], batch.num_rows
    raw = column(batch["act"].values, _numpy(element.stored), rows * width).reshape(rows, width)
    scale = torch.from_numpy(column(batch["scale"], _F4, rows)) if element.scaled else None
    doc, pos, token = (column(batch[name], kind, rows) for name, kind in _IDS)
    return Slice(torch.from_numpy(raw), scale, doc, pos, token, dtype)


@functools.cache
def _numpy(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype
