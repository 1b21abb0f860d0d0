"""An open store: its commits and slices, each verified against its checksum before rows are returned."""

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Shaped, UInt8, UInt32, UInt64
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards import commits as commit_files
from sae_dist.shards import format, manifest, records, slices, statistics
from sae_dist.shards.commits import Commit, SliceRef
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.manifest import Manifest
from sae_dist.shards.records import CorruptData
from sae_dist.shards.slice_cache import SliceCache
from sae_dist.shards.slices import Slice
from sae_dist.shards.statistics import Statistics
from sae_dist.storage import ReadOnlyError, Storage

logger = logging.getLogger(__name__)

PARALLEL_COMMITS = 16  # small objects, so latency counts
UNITS_AT_ONCE = 1024  # whose statistics are asked for and kept until they are merged


class StoredRows(NamedTuple):
    """Consecutive rows of one unit."""

    x: Shaped[Tensor, "rows width"]
    doc: UInt64[np.ndarray, " rows"]
    pos: UInt32[np.ndarray, " rows"]
    token: UInt32[np.ndarray, " rows"]
    unit: int


class Store:
    """A store that is open for reading, and for writing through writer.py. Safe to use from several threads."""

    def __init__(self, storage: Storage, meta: StoreMeta, *, cache: SliceCache | None = None):
        self.storage = storage
        self.meta = meta
        self.cache = cache
        self._commits: dict[int, Commit] = {}
        self._schemas = {hook: format.schema(meta, hook) for hook in meta.hooks}
        self._lock = threading.Lock()
        self._scratch = threading.local()

    def scratch(self, size: int) -> UInt8[np.ndarray, " size"]:
        """A buffer of this thread, reused: allocating fresh pages costs more than filling them."""
        room = getattr(self._scratch, "room", None)
        if room is None or len(room) < size:
            room = self._scratch.room = np.empty(size, np.uint8)
        return room[:size]

    def commit(self, unit: int) -> Commit | None:
        """The commit of `unit`, None while there is none. Commits never change and are cached."""
        known = self._commits.get(unit)
        if known is not None:
            return known
        commit = self._read_commit(unit)
        if commit is None:
            return None
        with self._lock:
            return self._commits.setdefault(unit, commit)

    def _read_commit(self, unit: int) -> Commit | None:
        try:
            return commit_files.read(self.storage, unit, self.meta)
        except FileNotFoundError:
            return None

    def committed(self) -> dict[int, Commit]:
        """All commits of now, by unit."""
        listed = (format.unit_of_commit_key(entry.key) for entry in self.storage.list("commit/"))
        units = sorted(unit for unit in listed if unit is not None and unit < self.meta.n_units)
        with ThreadPoolExecutor(PARALLEL_COMMITS) as pool:
            commits = pool.map(self.commit, units)
        return {unit: commit for unit, commit in zip(units, commits, strict=True) if commit is not None}

    def snapshot(self, otherwise: Storage | None = None) -> Manifest:
        """Writes the current commits as an immutable manifest; returns the newest one if it is the same.

        For a read-only store the manifest is written to `otherwise`.
        """
        commits = self.committed()
        try:
            return manifest.write(self.storage, self.meta, commits)
        except ReadOnlyError as error:
            if otherwise is None:
                raise
            logger.warning("%s; the manifest that pins it is kept in %s", error, otherwise.uri)
            return manifest.write(otherwise, self.meta, commits)

    def pinned(self, version: int, otherwise: Storage | None = None) -> Manifest:
        """Manifest `version` as `snapshot` left it, after `check`."""
        places = [place for place in (otherwise, self.storage) if place is not None]
        there = [place for place in places if place.exists(manifest.manifest_key(version))]
        pinned = manifest.read(there[0] if there else self.storage, self.meta, version)
        self.check(pinned)
        return pinned

    def check(self, pinned: Manifest) -> None:
        """UserError unless the store has the same rows as `pinned`; further units are allowed.

        A unit that was withdrawn and harvested again counts as the same if its rows are.
        """
        commits = self.committed()
        changed = [u for u, e in pinned.commits.items() if u in commits and commits[u].digest != e.digest]
        other = [
            unit for unit in changed
            if not commit_files.withdrawn_as(self.storage, commits[unit], pinned.commits[unit].digest)
        ]  # fmt: skip
        manifest.check(pinned, commits, other, place=self.storage.uri)

    def read_slice(self, hook: str, unit: int, index: int) -> Slice:
        """Slice `index` of `unit`, its bytes verified; `CorruptData` if they are wrong in every try."""
        commit = self.commit(unit)
        if commit is None:
            raise UserError(f"unit={unit} of {self.storage.uri} is not committed; harvest it first")
        if hook not in commit.shards:
            raise self._no_such(hook)
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
        try:
            return slices.parse(data, self._schemas[hook], self.meta.dtype, (ref.rows, self.meta.hooks[hook]))
        except (pa.ArrowException, ValueError, EOFError, OSError) as error:
            raise CorruptData(
                f"{self.storage.uri}/{shard.key} slice {index} is no record batch of {ref.rows} rows "
                f"({str(error).splitlines()[0]}); unit {unit} has to be harvested again"
            ) from None

    def read_slices(self, hooks: Sequence[str], unit: int, index: int) -> dict[str, Slice]:
        """Slice `index` of `unit` at several hook points; `CorruptData` unless their rows are of the same tokens."""
        first, *others = hooks
        found = {first: self.read_slice(first, unit, index)}
        for hook in others:
            part = found[hook] = self.read_slice(hook, unit, index)
            for name in ("doc", "pos", "token"):
                if not np.array_equal(getattr(part, name), getattr(found[first], name)):
                    raise CorruptData(
                        f"slice {index} of unit {unit} of {self.storage.uri}: the rows of hook={hook} and of "
                        f"hook={first} differ in their {name}, so that they are not of the same tokens; "
                        f"{self._cure_of_other_rows(unit)}"
                    )
        return found

    def _cure_of_other_rows(self, unit: int) -> str:
        return f"harvest unit {unit} again, both hook points in one pass"

    def _bytes(self, key: str, ref: SliceRef) -> UInt8[np.ndarray, " bytes"] | None:
        """The verified bytes of a slice; None if they are wrong in every try."""

        def fetch() -> UInt8[np.ndarray, " bytes"]:
            return slices.fetch(self.storage, key, ref)

        cache = self.cache if self.storage.local_path(key) is None else None
        for _ in range(records.READ_TRIES):
            data = fetch() if cache is None else cache.get(ref, fetch)
            if len(data) == ref.bytes and format.xxh3_128(data) == ref.xxh3_128:
                return data
            if cache is not None:
                cache.drop(ref)
        return None

    def _no_such(self, hook: str) -> UserError:
        return UserError(f"hook={hook} is not in {self.storage.uri}; it has {', '.join(self.meta.hooks)}")

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
        parts = self._each_statistics(hook, chosen)
        first = next(parts, None)
        if first is None:
            return statistics.empty(self.meta.hooks[hook])
        return statistics.merged(itertools.chain([first], parts))

    def _each_statistics(self, hook: str, units: Sequence[int]) -> Iterator[Statistics]:
        """The statistics of those units that are committed, in their order: sums depend on it."""
        with ThreadPoolExecutor(PARALLEL_COMMITS) as pool:
            for start in range(0, len(units), UNITS_AT_ONCE):
                block = units[start : start + UNITS_AT_ONCE]
                found = pool.map(self.unit_statistics, block, itertools.repeat(hook))
                yield from (part for part in found if part is not None)

    def unit_statistics(self, unit: int, hook: str) -> Statistics | None:
        """The statistics of a hook point in a unit; None while it has no commit."""
        try:
            record = commit_files.read_record(self.storage, unit)
        except FileNotFoundError:
            return None
        what = f"commit of unit {unit}: statistics.{hook}"
        found = record.get("statistics")
        own = found.get(hook) if isinstance(found, dict) else None
        return statistics.from_json(own or {}, width=self.meta.hooks[hook], what=what)


def heldout(store: Store, hook: str, batch_rows: int) -> Iterator[StoredRows]:
    """The rows of the held-out units in the order stored, at most `batch_rows` at a time, none across two units."""
    for unit in range(store.meta.train_units, store.meta.n_units):
        yield from unit_rows(store, hook, unit, batch_rows)


def heldout_pairs(store: Store, hooks: Hooks, batch_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of those rows what is read and what is to be rebuilt, hook points side by side."""
    for unit in range(store.meta.train_units, store.meta.n_units):
        for parts in _slices(store, hooks.every, unit):
            for rows in _pieces(parts[hooks.every[0]], batch_rows):
                x, *target = [torch.cat([parts[hook].rows(rows) for hook in names], 1) for names in hooks.sides]
                yield x, target[0] if target else x


def first_heldout_pairs(
    store: Store, hooks: Hooks, rows: int, batch_rows: int = 2048
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `rows` of `heldout_pairs`, or all where there are fewer, whatever slices they lie in."""
    for x, target in heldout_pairs(store, hooks, batch_rows):
        yield x[:rows], target[:rows]
        rows -= len(x)
        if rows <= 0:
            return


def unit_rows(store: Store, hook: str | Sequence[str], unit: int, batch_rows: int) -> Iterator[StoredRows]:
    """The rows of one unit in the order stored; of several hook points side by side."""
    hooks = (hook,) if isinstance(hook, str) else tuple(hook)
    for parts in _slices(store, hooks, unit):
        part = parts[hooks[0]]
        for rows in _pieces(part, batch_rows):
            x = part.rows(rows) if len(hooks) == 1 else torch.cat([parts[one].rows(rows) for one in hooks], 1)
            yield StoredRows(x, part.doc[rows], part.pos[rows], part.token[rows], unit)


def _slices(store: Store, hooks: Sequence[str], unit: int) -> Iterator[dict[str, Slice]]:
    commit = store.commit(unit)
    if commit is None:
        raise UserError(f"unit={unit} of {store.storage.uri} is not committed; harvest it first")
    for index in range(len(commit.shards[hooks[0]].slices)):
        yield store.read_slices(hooks, unit, index)


def _pieces(part: Slice, batch_rows: int) -> Iterator[slice]:
    return (slice(start, start + batch_rows) for start in range(0, len(part.doc), batch_rows))
