"""Writes stores and units. A unit becomes visible in one atomic step, whoever else writes it or dies."""

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int64, Integer, Shaped
from torch import Tensor

from sae_dist import config, faults
from sae_dist import storage as objects
from sae_dist.config import UserError
from sae_dist.shards import commits, format, permutation, quantize, records, statistics, stores
from sae_dist.shards.commits import Commit, ShardFile, SliceRef
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.reader import Store
from sae_dist.storage import Storage, StorageError

AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MAGIC = b"ARROW1\0\0"  # how an Arrow IPC file begins, padding included
MAX_NONFINITE = 0.01  # share of rows with a NaN, an infinity or an overflow at which a unit is refused
logger = logging.getLogger(__name__)


class WrittenUnit(NamedTuple):
    """The commit of a unit, and whether this process wrote it; if not, it was a duplicate."""

    commit: Commit
    won: bool


def create(storage: Storage, meta: StoreMeta) -> Store:
    """Opens the store of `meta` at `storage`, or creates it; UserError when another store is there."""
    if not storage.exists("store.json"):
        objects.check_conditional_create(storage)
        storage.create("store.json", records.seal({"name": meta.digest, "meta": config.to_dict(meta)}))
    store = stores.open(storage)
    if store.meta.digest != meta.digest:
        there, here = config.to_dict(store.meta), config.to_dict(meta)
        names = [
            f.name for f in dataclasses.fields(StoreMeta) if there[f.name] != here[f.name] and f.name != "created_by"
        ]
        diff = "; ".join(f"{name}: {there[name]!r} there, {here[name]!r} here" for name in names)
        raise UserError(f"store={storage.uri} holds something else ({diff}); choose another place or the same settings")
    return store


def write_unit(
    store: Store,
    unit: int,
    activations: Mapping[str, Shaped[Tensor, "rows width"]],
    *,
    doc: Integer[np.ndarray | Tensor, " rows"],
    pos: Integer[np.ndarray | Tensor, " rows"],
    token: Integer[np.ndarray | Tensor, " rows"],
    max_nonfinite: float = MAX_NONFINITE,
    left_out: int = 0,
) -> Commit:
    """Writes the unit and commits it; returns its commit, whoever wrote it."""
    return write_unit_once(
        store, unit, activations, doc=doc, pos=pos, token=token, max_nonfinite=max_nonfinite, left_out=left_out
    ).commit


def write_unit_once(
    store: Store,
    unit: int,
    activations: Mapping[str, Shaped[Tensor, "rows width"]],
    *,
    doc: Integer[np.ndarray | Tensor, " rows"],
    pos: Integer[np.ndarray | Tensor, " rows"],
    token: Integer[np.ndarray | Tensor, " rows"],
    max_nonfinite: float = MAX_NONFINITE,
    left_out: int = 0,
    producer: str = "",
) -> WrittenUnit:
    """Data objects of all hooks first, under a name nobody else has; then the commit, created only if absent.

    `producer` begins that name, and so says in the commit who wrote it. `max_nonfinite`: with a larger share of rows
    that are not finite the unit is refused. `left_out`: rows that the caller has dropped already, for the record.
    Rows are stored in a permuted order keyed by (seed, unit), the same for all hooks, so that the rows of a document
    are spread over all slices of the unit.
    """
    known = store.commit(unit)
    if known is not None:
        return WrittenUnit(known, won=False)
    meta = store.meta
    x = {hook: activations[hook].detach().cpu().contiguous() for hook in meta.hooks if hook in activations}
    columns = {"doc": _column(doc, np.uint64), "pos": _column(pos, np.uint32), "token": _column(token, np.uint32)}
    _check_shapes(meta, unit, x, activations.keys(), columns)
    measured = {hook: statistics.measure(part) for hook, part in x.items()}
    finite = torch.stack([measured[hook].finite & _fits(meta, x[hook]) for hook in x]).all(0)
    kept, dropped = _kept_rows(meta, unit, finite, max_nonfinite)
    order = kept[permutation.permutation(len(kept), permutation.key(meta.seed, unit))]
    attempt = f"{producer}{uuid.uuid4().hex}"
    shards = {}
    faults.point("writer.before_data", unit=unit)
    for hook in meta.hooks:
        key = format.shard_key(hook, unit, attempt)
        data, refs, error = _arrow_file(store, hook, x[hook], columns, order)
        shards[hook] = ShardFile(key, len(data), format.xxh3_128(data), refs, error)
        faults.point("writer.before_hook", unit=unit, hook=hook)
        store.storage.write(key, data)
        faults.point("writer.after_hook", unit=unit, hook=hook)
    commit = Commit(unit, attempt, meta.digest, len(order), left_out + dropped, shards, digest="")
    faults.point("writer.before_commit", unit=unit)
    _check_data_exists(store, shards)
    told = {hook: statistics.to_json(measured[hook].statistics) for hook in meta.hooks}
    store.storage.create(format.commit_key(unit), commits.to_bytes(commit, told))
    faults.point("writer.after_commit", unit=unit)
    winner = store.commit(unit)  # read back whatever `create` said: its answer may have been lost and retried
    assert winner is not None, f"unit {unit} has no commit straight after one was created"
    if winner.attempt == attempt:
        return WrittenUnit(winner, won=True)
    for shard in shards.values():
        store.storage.delete(shard.key)
    logger.warning("unit %d was committed by another producer; this copy of it is dropped", unit)
    return WrittenUnit(winner, won=False)


def _check_data_exists(store: Store, shards: dict[str, ShardFile]) -> None:
    """StorageError if data was deleted before its commit, as `store gc` with a small age does to slow producers."""
    for shard in shards.values():
        try:
            there = store.storage.size(shard.key)
        except FileNotFoundError:
            there = 0
        if there != shard.bytes:
            raise StorageError(
                f"store={store.storage.uri}: {shard.key} has {there} bytes of {shard.bytes} before it could be "
                "committed (did `store gc` with a small age_hours delete it?); run the command again to resume"
            )


def _column(values: Integer[np.ndarray | Tensor, " rows"], dtype: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array.astype(dtype)


def _check_shapes(meta: StoreMeta, unit: int, x: dict[str, Tensor], given: Any, columns: dict[str, np.ndarray]) -> None:
    if not 0 <= unit < meta.n_units:
        raise UserError(f"unit={unit} is outside the store, which has units 0 to {meta.n_units - 1}")
    if set(given) != set(meta.hooks):
        raise UserError(
            f"hooks={sorted(given)} given for unit {unit}, the store has {sorted(meta.hooks)}; give them all"
        )
    rows = {name: len(column) for name, column in columns.items()} | {hook: len(part) for hook, part in x.items()}
    if len(set(rows.values())) != 1 or len(columns["doc"]) > meta.unit_rows:
        raise UserError(f"unit {unit} has rows {rows}; all alike and at most unit_rows={meta.unit_rows}")
    for hook, part in x.items():
        if part.shape[1] != meta.hooks[hook]:
            raise UserError(f"hook={hook} has width {part.shape[1]} in unit {unit}, the store says {meta.hooks[hook]}")


def _fits(meta: StoreMeta, x: Float[Tensor, "rows width"]) -> Bool[Tensor, " rows"]:
    """Rows that stay finite when they are cast to the store's dtype: 70,000 does not in float16."""
    view = meta.element.view
    if meta.element.scaled or x.dtype == view or torch.finfo(view).max >= torch.finfo(x.dtype).max:
        return torch.ones(len(x), dtype=torch.bool)
    return torch.cat([part.to(view).isfinite().all(1) for part in x.split(statistics.CHUNK_ROWS)])


def _kept_rows(
    meta: StoreMeta, unit: int, finite: Bool[Tensor, " rows"], most: float
) -> tuple[Int64[np.ndarray, " kept"], int]:
    """The rows to store and the number of dropped ones; a row that is not finite at one hook is dropped at all."""
    bad = int((~finite).sum())
    if bad > most * len(finite):
        raise UserError(
            f"unit {unit} has {bad} rows of {len(finite)} with a NaN, an infinity or an overflow, more than "
            f"max_nonfinite={most}; check the model's dtype (float16 overflows, bfloat16 does not)"
        )
    if meta.row_policy == "keep" or bad == 0:
        return np.arange(len(finite)), 0
    return np.flatnonzero(finite.numpy()), bad


def _arrow_file(
    store: Store,
    hook: str,
    x: Float[Tensor, "rows width"],
    columns: dict[str, np.ndarray],
    order: Int64[np.ndarray, " kept"],
) -> tuple[memoryview, tuple[SliceRef, ...], float]:
    """The shard as bytes (good until the next call), its slices, and the relative squared error of what was stored."""
    meta = store.meta
    schema = format.schema(meta, hook)
    first = len(MAGIC) + schema.serialize().size
    slices = -(-len(order) // meta.slice_rows)
    row_bytes = x.shape[1] * meta.element.stored.itemsize + 4 * meta.element.scaled + 16
    room = store.scratch(2 * first + len(order) * row_bytes + (slices + 1) * 4096)
    sink = pa.FixedSizeBufferWriter(pa.py_buffer(room))
    placed, error, square = [], 0.0, 0.0
    with pa.ipc.new_file(sink, schema) as file:
        for start in range(0, len(order), meta.slice_rows):
            rows = order[start : start + meta.slice_rows]
            part = _gather(x, torch.from_numpy(rows))
            encoded = quantize.encode(part, meta.dtype)
            if part.dtype != meta.element.view:
                e, s = quantize.squared_error(part, encoded, meta.dtype)
                error, square = error + e, square + s
            flat = _array(encoded.bits.view(-1).numpy(), meta.element.arrow)
            arrays = [pa.FixedSizeListArray.from_arrays(flat, meta.hooks[hook])]
            if encoded.scale is not None:
                arrays.append(_array(encoded.scale.numpy(), pa.float32()))
            arrays += [_array(column[rows], schema.field(name).type) for name, column in columns.items()]
            before = sink.tell() or first  # magic and schema are written along with the first batch
            file.write_batch(pa.record_batch(arrays, schema=schema))
            placed.append((before, sink.tell() - before, len(rows)))
    whole = room.data[: sink.tell()]
    refs = tuple(SliceRef(at, size, rows, format.xxh3_128(whole[at : at + size])) for at, size, rows in placed)
    return whole, refs, error / square if square else 0.0


def _gather(x: Float[Tensor, "rows width"], rows: Int64[Tensor, " some"]) -> Float[Tensor, "some width"]:
    """x[rows], moved as integers: indexing bfloat16 takes eight times as long."""
    return torch.index_select(x.view(AS_INTEGERS[x.element_size()]), 0, rows).view(x.dtype)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """An Arrow array of the values without a copy; pa.array would import pandas."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
