"""Which rows of which windows make up each step, and which windows are read ahead."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sae_dist.config import UserError
from sae_dist.shards import order
from sae_dist.shards.order import Round
from sae_dist.shards.windows import LoaderClosed, Window, WindowPool

POLL_S = 0.05


class WindowPart(NamedTuple):
    """The rows of a batch that one lane takes from one window."""

    window: Window
    rows: Int64[np.ndarray, " rows"]  # of the window, ascending
    pieces: list[order.SliceRows]  # the same rows by slice


class StepRows(NamedTuple):
    """The rows of one global batch that the lanes of one reader serve."""

    number: int
    epoch: int  # of the first row of the global batch
    parts: list[WindowPart]
    place: Int64[np.ndarray, " batch"]  # of the parts' rows in the global batch as a single reader has it
    units_done: int  # units of the first epoch that no later step reads again in that epoch


class ReadSchedule:
    """The steps of the lanes that one reader serves; used by one thread, which may wait for producers and storage."""

    def __init__(
        self,
        windows: WindowPool,
        *,
        batch: int,
        lanes: range,
        n_units: int,
        start_step: int,
        stop_step: int | None,
        live: bool,
        stall_s: float,
    ):
        self.windows, self.store, self.order, self.seed = windows, windows.store, windows.config, windows.seed
        self.batch, self.lanes, self.n_units, self.live, self.stall_s = batch, lanes, n_units, live, stall_s
        self.uncommitted_s = 0.0  # seconds spent waiting for producers to commit a unit
        self._start_step, self._stop_step = start_step, stop_step
        self._rounds: dict[tuple[int, int], Round] = {}
        self._last: list[int] | None = None  # rows that the lanes will have given when the last step ends this round

    def __iter__(self) -> Iterator[StepRows]:
        place = order.locate(self._start_step * self.batch, self.order, self.seed, self.n_units, self._row_counts)
        round, offset = self._enter(place.epoch, place.number, place.offset), place.offset
        step = self._start_step
        while self._stop_step is None or step < self._stop_step:
            parts: list[WindowPart] = []
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
            yield StepRows(step, epoch, parts, np.concatenate(places), self._units_done(round, offset))
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
        """Deals the round and starts the reads of all its lanes at once."""
        round = self._round(epoch, number)
        given = order.apportion(offset, [lane.rows for lane in round.lanes])
        for lane in self.lanes:
            if given[lane] < round.lanes[lane].rows:
                self.windows.submit(round, lane, order.window_at(self.order, round.lanes[lane], given[lane]))
        return round

    def _round(self, epoch: int, number: int) -> Round:
        """The dealt round; in live mode waits until its units are committed."""
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
            if self.windows.stop.wait(pause):
                raise LoaderClosed
            self.uncommitted_s += time.perf_counter() - started - waited
            pause = min(pause * 1.5, 2.0)
        return commit.rows

    def _lane_parts(self, round: Round, lane: int, start: int, stop: int) -> list[WindowPart]:
        """Rows [start, stop) of a lane in the order in which it serves them, window by window."""
        parts = []
        dealt = round.lanes[lane]
        while start < stop:
            number = order.window_at(self.order, dealt, start)
            fresh = not self.windows.is_open(round, lane, number)
            window = self.windows.get(round, lane, number)
            if fresh:
                self._read_ahead(round, lane, number)
            last = window.first + len(window.rows)
            upto = min(stop, last)
            rows = np.sort(window.rows[start - window.first : upto - window.first])
            parts.append(WindowPart(window, rows - window.first, order.rows_by_slice(dealt, rows)))
            start = upto
            if upto == last:
                self.windows.drop(round, lane, number)
        return parts

    def _read_ahead(self, round: Round, lane: int, window: int) -> None:
        """Reads one window ahead in every lane: at most 2 x lanes x window slices are in memory."""
        if (window + 1) * self.order.window < len(round.lanes[lane].unit):
            start, _ = order.window_rows(self.order, round.lanes[lane], window + 1)
            if self._last is None or start < self._last[lane]:
                self.windows.submit(round, lane, window + 1)
            return
        if self._last is not None:
            return
        epoch, number = self._after(round)
        units = order.round_units(self.order, self.seed, self.n_units, epoch, number)
        if (epoch, number) in self._rounds or all(self.store.commit(int(unit)) is not None for unit in units):
            upcoming = self._round(epoch, number)
            if upcoming.lanes[lane].rows:
                self.windows.submit(upcoming, lane, 0)
