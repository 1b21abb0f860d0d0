"""Batches of activations in the order of order.py, read ahead by a thread, in memory that does not grow."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt32, UInt64
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards import order, quantize
from sae_dist.shards.hooks import Hooks, check, width
from sae_dist.shards.manifest import Manifest
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.permutation import MASK
from sae_dist.shards.read_schedule import POLL_S, ReadSchedule, StepRows
from sae_dist.shards.reader import Store
from sae_dist.shards.room import Move, move, side
from sae_dist.shards.windows import LoaderClosed, WindowPool

COPY_THREADS = 2  # threads that copy rows; torch copies so few rows at a time in one


class Batch(NamedTuple):
    """This rank's rows of one global batch, grouped by slice; use as a set, the order within carries no randomness."""

    x: Shaped[Tensor, "batch width"]  # in the store's dtype; bfloat16 where the store is quantised
    target: Shaped[Tensor, "batch target_width"]  # the same rows of what is to be rebuilt: x itself, or as wide as that
    unit: Int64[np.ndarray, " batch"]
    row: Int64[np.ndarray, " batch"]  # within the unit, as stored
    doc: UInt64[np.ndarray, " batch"]
    pos: UInt32[np.ndarray, " batch"]
    token: UInt32[np.ndarray, " batch"]
    place: Int64[np.ndarray, " batch"]  # in the global batch as a single reader has it
    step: int
    epoch: int  # of the first row of the global batch
    order_hash: int  # this rank's share of it after this step; shares of all ranks add modulo 2^64
    units_done: int  # units of the first epoch that no later step reads again in that epoch


class Waits(NamedTuple):
    """Seconds spent waiting so far, by who waited for whom; the slow side is the one that is waited for."""

    starved_s: float  # the trainer for a batch
    blocked_s: float  # this loader for the trainer to take one
    read_s: float  # this loader for bytes from the storage
    uncommitted_s: float  # this loader for producers to commit a unit (live mode)
    batches: int
    bytes: int


class Loader:
    """An iterator of `Batch`es from `start_step`, endless without a `stop_step`; close it, or use it in a `with`."""

    def __init__(
        self,
        store: Store,
        *,
        hooks: Hooks,
        batch: int,
        seed: int,
        order: OrderConfig | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        order_hash: int = 0,
        rank: int = 0,
        world: int = 1,
        live: bool = False,
        n_units: int | None = None,
        manifest: Manifest | None = None,
        prefetch: int = 4,
        threads: int = 4,
        reuse_buffers: bool = False,
        pinned: bool = False,
        stall_s: float = 3600.0,
        stop: Callable[[], bool] = lambda: False,
    ):
        """`batch` is global, over all ranks; `order_hash` is the value after `start_step` steps: on resume, the
        total on rank 0 and 0 elsewhere. Nothing is read that only steps from `stop_step` on would need.
        The order of rows does not depend on `hooks`; each hook point is read once, whatever sides it is on.
        `reuse_buffers`: a batch is overwritten once the next has been asked for. `pinned`: it is in page-locked memory,
        from where a GPU copies while the CPU goes on; only where there is a GPU.
        Once `stop()` is true the iterator ends, within a second, even while it waits for rows.
        `stall_s`: how long a live loader waits for one unit before it says that producers are gone.
        """
        self.store, self.hooks, self.batch, self.live = store, hooks, batch, live
        self.order = order or OrderConfig()
        self.n_units = store.meta.train_units if n_units is None else n_units
        self._check(rank, world, manifest)
        self._hash, self._asked_to_stop = order_hash, stop
        self._dtype = quantize.batch_dtype(store.meta.dtype)
        self._ready: queue.Queue[Batch | None] = queue.Queue(prefetch)
        widths = [width(store.meta, names) for names in hooks.sides]
        # Used buffers by their width; decoded rows are in fresh memory, so that of them none is kept.
        self._spare: dict[int, queue.SimpleQueue[Tensor]] = {}
        if reuse_buffers and not store.meta.element.scaled:
            self._spare = {width: queue.SimpleQueue() for width in widths}
        self._lent, self._pinned = list[Tensor](), pinned
        self._stop = threading.Event()
        self._windows = WindowPool(store, hooks.every, self.order, seed, threads=threads, stop=self._stop)
        self._schedule = ReadSchedule(
            self._windows, batch=batch, n_units=self.n_units, start_step=start_step, stop_step=stop_step, live=live,
            lanes=range(rank, self.order.lanes, world),  # interleaved: a round of few slices still reaches every rank
            stall_s=stall_s,
        )  # fmt: skip
        self._starved_s = self._blocked_s = 0.0
        self._batches_made = self._bytes_made = 0
        self._movers = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="mover")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._producing = self._ahead.submit(self._produce)

    def _check(self, rank: int, world: int, manifest: Manifest | None) -> None:
        meta = self.store.meta
        check(self.hooks, meta, self.store.storage.uri)
        if not 0 <= rank < world <= self.order.lanes:
            raise UserError(
                f"rank={rank} of world={world} readers with order.lanes={self.order.lanes}; raise order.lanes"
            )
        if self.batch < 1 or not 1 <= self.n_units <= meta.train_units:
            raise UserError(
                f"batch={self.batch}, n_units={self.n_units}; the store has {meta.train_units} training units"
            )
        if manifest is not None:
            self.store.check(manifest)
        committed = self.store.committed()  # all at once: one by one they would cost a round trip each
        missing = [unit for unit in range(self.n_units) if unit not in committed]
        if missing and not self.live:
            raise UserError(
                f"store={self.store.storage.uri} lacks {len(missing)} of {self.n_units} training units (unit "
                f"{missing[0]} first); harvest them, read fewer with n_units, or follow the harvest with live"
            )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for used in self._lent:
            self._spare[used.shape[1]].put(used)
        self._lent = []
        started = time.perf_counter()
        item = self._take()
        self._starved_s += time.perf_counter() - started
        if item is None:  # asked to stop, or the thread has ended
            self.close()
            self._producing.result()  # raises here what ended the thread
            raise StopIteration
        if self._spare:
            self._lent = [item.x] if item.target is item.x else [item.x, item.target]
        return item

    def _take(self) -> Batch | None:
        while not self._stop.is_set():
            try:
                return self._ready.get(timeout=0.5)
            except queue.Empty:
                if self._asked_to_stop():
                    return None
        return None

    def waits(self) -> Waits:
        """A copy of the counters; subtract two to get an interval."""
        return Waits(
            self._starved_s, self._blocked_s, self._windows.read_s, self._schedule.uncommitted_s, self._batches_made,
            self._bytes_made,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the threads; batches not yet taken are dropped."""
        self._stop.set()
        self._windows.close()
        self._ahead.shutdown(wait=True)
        self._movers.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _produce(self) -> None:
        try:
            for batch in map(self._gather, self._schedule):
                if not self._hand_over(batch):
                    return
        except LoaderClosed:
            return
        finally:
            self._hand_over(None)  # the consumer then asks this thread what happened

    def _hand_over(self, item: Batch | None) -> bool:
        started = time.perf_counter()
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            self._blocked_s += time.perf_counter() - started
            return True
        return False

    def _gather(self, step: StepRows) -> Batch:
        meta, n = self.store.meta, len(step.place)
        sides = [side(meta, hooks, n, self._buffer) for hooks in self.hooks.sides]
        rooms = [room for one in sides for room in one.rooms]
        unit, row = np.empty(n, np.int64), np.empty(n, np.int64)
        doc, pos, token = np.empty(n, np.uint64), np.empty(n, np.uint32), np.empty(n, np.uint32)
        at, moves = 0, list[Move]()
        for window, _, pieces in step.parts:
            for piece in pieces:
                to, index = slice(at, at + len(piece.rows)), torch.from_numpy(piece.rows)
                for room in rooms:
                    stored = window.slices[piece.unit, piece.slice][room.hook]
                    moves.append(Move(stored.bits.view(room.bits.dtype), index, room.bits[to]))
                    if stored.scale is not None:
                        torch.index_select(stored.scale, 0, index, out=room.scale[to])
                unit[to], row[to] = piece.unit, piece.slice * meta.slice_rows + piece.rows
                at = to.stop
        shares = [
            moves[i * len(moves) // COPY_THREADS : (i + 1) * len(moves) // COPY_THREADS] for i in range(COPY_THREADS)
        ]
        moving = [self._movers.submit(move, share) for share in shares]
        at = 0
        for window, rows, _ in step.parts:  # while the rows are on their way
            to = slice(at, at + len(rows))
            doc[to], pos[to], token[to] = window.doc[rows], window.pos[rows], window.token[rows]
            at = to.stop
        self._hash = (self._hash + order.fold(step.number, unit, row)) & MASK
        for share in moving:
            share.result()
        filled = [one.filled(meta) for one in sides]
        if self._pinned and meta.element.scaled:
            filled = [rows.pin_memory() for rows in filled]
        self._batches_made += 1
        self._bytes_made += sum(room.bits.nbytes for room in rooms)
        return Batch(
            filled[0], filled[-1], unit, row, doc, pos, token, step.place, step.number, step.epoch, self._hash,
            step.units_done,
        )  # fmt: skip

    def _buffer(self, n: int, width: int) -> Tensor:
        """Room for a batch; a used one if one of that size came back, since fresh pages cost more than the copy."""
        while self._spare and not self._spare[width].empty():
            spare = self._spare[width].get()
            if len(spare) == n:
                return spare
        return torch.empty(n, width, dtype=self._dtype, pin_memory=self._pinned)
