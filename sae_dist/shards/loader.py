"""Batches of activations in the order of order.py, read ahead by a thread, in memory that does not grow."""

import math
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
from sae_dist.shards.manifest import Manifest
from sae_dist.shards.order import OrderConfig, Round
from sae_dist.shards.permutation import MASK
from sae_dist.shards.reader import Store
from sae_dist.shards.windows import Closed, Window, Windows

GATHER = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # rows are moved as integers: any dtype, no rounding
POLL_S = 0.05
MOVERS = 2  # threads that copy rows; torch copies so few rows at a time in one


class Batch(NamedTuple):
    """This rank's rows of one global batch, grouped by slice; use as a set, the order within carries no randomness."""

    x: Shaped[Tensor, "batch width"]  # in the store's dtype; bfloat16 where the store is quantised
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


class Part(NamedTuple):
    """What one lane gives to a batch out of one window."""

    window: Window
    rows: Int64[np.ndarray, " rows"]  # of the window, ascending
    pieces: list[order.Piece]  # the same rows by slice


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
        hook: str,
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
        `reuse_buffers`: x is overwritten once the next batch has been asked for. `pinned`: x is in page-locked memory,
        from where a GPU copies while the CPU goes on; only where there is a GPU.
        Once `stop()` is true the iterator ends, within a second, even while it waits for rows.
        `stall_s`: how long a live loader waits for one unit before it says that producers are gone.
        """
        self.store, self.hook, self.batch, self.seed = store, hook, batch, seed
        self.order = order or OrderConfig()
        self.n_units = store.meta.train_units if n_units is None else n_units
        self.live, self.stall_s, self._asked_to_stop = live, stall_s, stop
        self._check(rank, world, manifest)
        self.lanes = range(rank, self.order.lanes, world)  # interleaved: a round of few slices still reaches every rank
        self._start_step, self._stop_step, self._hash = start_step, stop_step, order_hash
        self._dtype = quantize.batch_dtype(store.meta.dtype)
        self._rounds: dict[tuple[int, int], Round] = {}
        self._last: list[int] | None = None  # rows that the lanes will have given when the last step ends this round
        self._ready: queue.Queue[Batch | None] = queue.Queue(prefetch)
        self._spare: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._reuse, self._lent, self._pinned = reuse_buffers, None, pinned
        self._stop = threading.Event()
        self._windows = Windows(store, hook, self.order, seed, threads=threads, stop=self._stop)
        self._seconds = dict.fromkeys(("starved_s", "blocked_s", "uncommitted_s"), 0.0)
        self._batches_made = self._bytes_made = 0
        self._movers = ThreadPoolExecutor(MOVERS, thread_name_prefix="mover")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._producing = self._ahead.submit(self._produce)

    def _check(self, rank: int, world: int, manifest: Manifest | None) -> None:
        meta = self.store.meta
        if self.hook not in meta.hooks:
            raise UserError(f"hook={self.hook} is not in {self.store.storage.uri}; it has {', '.join(meta.hooks)}")
        if not 0 <= rank < world <= self.order.lanes:
            raise UserError(
                f"rank={rank} of world={world} readers with order.lanes={self.order.lanes}; raise order.lanes"
            )
        if self.batch < 1 or not 1 <= self.n_units <= meta.train_units:
            raise UserError(
                f"batch={self.batch}, n_units={self.n_units}; the store has {meta.train_units} training units"
            )
        if manifest is not None:
            self.store.pinned(manifest.version)
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
        if self._lent is not None:
            self._spare.put(self._lent)
            self._lent = None
        started = time.perf_counter()
        item = self._take()
        self._seconds["starved_s"] += time.perf_counter() - started
        if item is None:  # asked to stop, or the thread has ended
            self.close()
            self._producing.result()  # raises here what ended the thread
            raise StopIteration
        if self._reuse:
            self._lent = item.x
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
        return Waits(**self._seconds, read_s=self._windows.read_s, batches=self._batches_made, bytes=self._bytes_made)

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
            for batch in self._batches():
                if not self._hand_over(batch):
                    return
        except Closed:
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
            self._seconds["blocked_s"] += time.perf_counter() - started
            return True
        return False

    def _batches(self) -> Iterator[Batch]:
        place = order.locate(self._start_step * self.batch, self.order, self.seed, self.n_units, self._row_counts)
        round, offset = self._enter(place.epoch, place.number, place.offset), place.offset
        step = self._start_step
        while self._stop_step is None or step < self._stop_step:
            parts: list[Part] = []
            places: list[Int64[np.ndarray, " rows"]] = []
            need, epoch = self.batch, None
            while need:
                if offset == round.rows:  # only when a row of the next round is needed: it may not be committed yet
                    self._drop_round(round)
                    round, offset = self._enter(*self._after(round), 0), 0
                    continue
                epoch = round.epoch if epoch is None else epoch
                count = min(need, round.rows - offset)
                sizes = [lane.rows for lane in round.lanes]
                self._last = self._last_rows(round, offset, self._rows_left(step, need))
                before, after = order.apportion(offset, sizes), order.apportion(offset + count, sizes)
                bounds = self.batch - need + np.cumsum([0, *(b - a for a, b in zip(before, after, strict=True))])
                for lane in self.lanes:
                    parts += self._lane_parts(round, lane, before[lane], after[lane])
                    places.append(np.arange(bounds[lane], bounds[lane + 1]))
                offset, need = offset + count, need - count
            assert epoch is not None
            yield self._gather(parts, np.concatenate(places), step, epoch, self._units_done(round, offset))
            step += 1

    def _rows_left(self, step: int, need: int) -> float:
        """Rows from the present one to the last that is to be served: `need` of this step's and the later steps'."""
        return math.inf if self._stop_step is None else need + (self._stop_step - step - 1) * self.batch

    def _last_rows(self, round: Round, offset: int, left: float) -> list[int] | None:
        """How many rows each lane will have given at the end, if that comes within this round."""
        if offset + left > round.rows:
            return None
        return order.apportion(offset + int(left), [lane.rows for lane in round.lanes])

    def _units_done(self, round: Round, offset: int) -> int:
        if round.epoch > 0:
            return self.n_units
        rounds = round.number + (offset == round.rows)
        return min(rounds * (self.order.round_units or self.n_units), self.n_units)

    def _after(self, round: Round) -> tuple[int, int]:
        last = round.number + 1 == order.n_rounds(self.order, self.n_units)
        return (round.epoch + 1, 0) if last else (round.epoch, round.number + 1)

    def _enter(self, epoch: int, number: int, offset: int) -> Round:
        """The dealt round, and the reads of all lanes under way at once rather than one lane after the other."""
        round = self._round(epoch, number)
        given = order.apportion(offset, [lane.rows for lane in round.lanes])
        for lane in self.lanes:
            if given[lane] < round.lanes[lane].rows:
                self._windows.submit(round, lane, order.window_at(self.order, round.lanes[lane], given[lane]))
        return round

    def _round(self, epoch: int, number: int) -> Round:
        """The dealt round; waits for its units in live mode."""
        if (epoch, number) not in self._rounds:
            units = order.round_units(self.order, self.seed, self.n_units, epoch, number)
            self._rounds[epoch, number] = order.deal(
                self.order,
                self.seed,
                epoch,
                number,
                units=units,
                rows=self._row_counts(units),
                slice_rows=self.store.meta.slice_rows,
            )
        return self._rounds[epoch, number]

    def _drop_round(self, round: Round) -> None:
        del self._rounds[round.epoch, round.number]

    def _row_counts(self, units: Int64[np.ndarray, " units"]) -> Int64[np.ndarray, " units"]:
        return np.array([self._rows_of(int(unit)) for unit in units], dtype=np.int64)

    def _rows_of(self, unit: int) -> int:
        started = time.perf_counter()
        pause = POLL_S
        while (commit := self.store.commit(unit)) is None:
            if not self.live:
                raise UserError(f"unit={unit} of {self.store.storage.uri} lost its commit while it was being read")
            waited = time.perf_counter() - started
            if waited > self.stall_s:
                raise UserError(
                    f"unit={unit} of {self.store.storage.uri} was not committed in {waited:.0f} s; is the "
                    "harvest still running? (sae-dist store ls shows what is there)"
                )
            if self._stop.wait(pause):
                raise Closed
            self._seconds["uncommitted_s"] += time.perf_counter() - started - waited
            pause = min(pause * 1.5, 2.0)
        return commit.rows

    def _lane_parts(self, round: Round, lane: int, start: int, stop: int) -> list[Part]:
        """Rows [start, stop) of a lane in the order in which it serves them, window by window."""
        parts = []
        dealt = round.lanes[lane]
        while start < stop:
            number = order.window_at(self.order, dealt, start)
            fresh = not self._windows.is_open(round, lane, number)
            window = self._windows.get(round, lane, number)
            if fresh:
                self._read_ahead(round, lane, number)
            last = window.first + len(window.rows)
            upto = min(stop, last)
            rows = np.sort(window.rows[start - window.first : upto - window.first])
            parts.append(Part(window, rows - window.first, order.split(dealt, rows)))
            start = upto
            if upto == last:
                self._windows.drop(round, lane, number)
        return parts

    def _read_ahead(self, round: Round, lane: int, window: int) -> None:
        """One window ahead in every lane: memory is at most 2 x lanes x window slices."""
        if (window + 1) * self.order.window < len(round.lanes[lane].unit):
            start, _ = order.window_rows(self.order, round.lanes[lane], window + 1)
            if self._last is None or start < self._last[lane]:
                self._windows.submit(round, lane, window + 1)
            return
        if self._last is not None:
            return
        epoch, number = self._after(round)
        units = order.round_units(self.order, self.seed, self.n_units, epoch, number)
        if (epoch, number) in self._rounds or all(self.store.commit(int(unit)) is not None for unit in units):
            upcoming = self._round(epoch, number)
            if upcoming.lanes[lane].rows:
                self._windows.submit(upcoming, lane, 0)

    def _gather(
        self, parts: list[Part], place: Int64[np.ndarray, " batch"], step: int, epoch: int, units_done: int
    ) -> Batch:
        meta, n = self.store.meta, sum(len(part.rows) for part in parts)
        width, scaled = meta.hooks[self.hook], meta.element.scaled
        moved = GATHER[meta.element.stored.itemsize]
        target = torch.empty(n, width, dtype=moved) if scaled else self._buffer(n, width).view(moved)
        scale = torch.empty(n if scaled else 0)
        unit, row = np.empty(n, np.int64), np.empty(n, np.int64)
        doc, pos, token = np.empty(n, np.uint64), np.empty(n, np.uint32), np.empty(n, np.uint32)
        at, moves = 0, []
        for window, _, pieces in parts:
            for piece in pieces:
                to, index = slice(at, at + len(piece.rows)), torch.from_numpy(piece.rows)
                stored = window.slices[piece.unit, piece.slice]
                moves.append((stored.bits.view(moved), index, target[to]))
                if stored.scale is not None:
                    torch.index_select(stored.scale, 0, index, out=scale[to])
                unit[to], row[to] = piece.unit, piece.slice * meta.slice_rows + piece.rows
                at = to.stop
        shares = [moves[i * len(moves) // MOVERS : (i + 1) * len(moves) // MOVERS] for i in range(MOVERS)]
        moving = [self._movers.submit(_move, share) for share in shares]
        at = 0
        for window, rows, _ in parts:  # while the rows are on their way
            to = slice(at, at + len(rows))
            doc[to], pos[to], token[to] = window.doc[rows], window.pos[rows], window.token[rows]
            at = to.stop
        self._hash = (self._hash + order.fold(step, unit, row)) & MASK
        for share in moving:
            share.result()
        x = quantize.decode(target, scale if scaled else None, meta.dtype)
        x = x.pin_memory() if self._pinned and scaled else x
        self._batches_made += 1
        self._bytes_made += target.nbytes
        return Batch(x, unit, row, doc, pos, token, place, step, epoch, self._hash, units_done)

    def _buffer(self, n: int, width: int) -> Tensor:
        """Room for a batch; a used one if one of that size came back, since fresh pages cost more than the copy."""
        while self._reuse and not self._spare.empty():
            spare = self._spare.get()
            if len(spare) == n:
                return spare
        return torch.empty(n, width, dtype=self._dtype, pin_memory=self._pinned)


def _move(moves: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Rows `index` of each source into its target."""
    for source, index, target in moves:
        torch.index_select(source, 0, index, out=target)
