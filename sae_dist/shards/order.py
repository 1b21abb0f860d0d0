"""The order of rows: a pure function of (row counts, seed, epoch, step), the same for every number of readers.

Units come in rounds; the slices of a round are permuted and dealt to lanes like cards; a lane pools `window` slices at
a time and serves their rows permuted; a global batch takes from every lane in proportion to what the lane holds. Every
permutation is keyed, so nothing has to be remembered but the step.

Shuffle quality. Rows of a document lie scattered over the S slices of its unit, so two rows of one batch are of the
same unit with probability 1/N (N units in the round) + 1/(lanes window) (they are of the same slice). With m rows of
a document in a unit of U rows, the variance of a batch mean of a document-level signal exceeds that of independent
rows by the factor

    1 + (batch - 1) m / U (1 / N + 1 / (lanes window)),

that is 1 + batch m / round_rows plus the price of keeping only lanes x window slices open instead of the round.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from sae_dist.config import UserError, frozen
from sae_dist.shards.permutation import MASK, key, mix64, permutation

UNITS, SLICES, ROWS = 1, 2, 3  # which permutation a key is for


@frozen
class OrderConfig:
    """How rows are shuffled; part of what a run pins, since it decides the order."""

    lanes: int = Field(default=8, ge=1, le=4096)  # readers in parallel at most; memory is lanes x window slices
    window: int = Field(default=4, ge=1)  # slices that a lane pools
    round_units: int = Field(default=0, ge=0)  # units shuffled together, 0 for the whole store; small for a live store


class Lane(NamedTuple):
    """The slices of a round that fell to one lane, in order."""

    unit: Int64[np.ndarray, " slices"]
    slice: Int64[np.ndarray, " slices"]
    start: Int64[np.ndarray, " slices+1"]  # rows of the lane before each slice; the last is their number

    @property
    def rows(self) -> int:
        return int(self.start[-1])


class Round(NamedTuple):
    """Units that are shuffled together and the lanes that their slices were dealt to."""

    epoch: int
    number: int
    units: Int64[np.ndarray, " units"]
    lanes: tuple[Lane, ...]
    rows: int


class SliceRows(NamedTuple):
    """Rows of a batch that come out of one slice."""

    unit: int
    slice: int
    rows: Int64[np.ndarray, " rows"]  # within the slice, ascending


RowCounts = Callable[[Int64[np.ndarray, " units"]], Int64[np.ndarray, " units"]]


def n_rounds(config: OrderConfig, n_units: int) -> int:
    return -(-n_units // (config.round_units or n_units))


def round_units(config: OrderConfig, seed: int, n_units: int, epoch: int, number: int) -> Int64[np.ndarray, " units"]:
    """The units of a round. In the first pass of a store with rounds they go by number: the store may be growing."""
    growing = epoch == 0 and config.round_units > 0
    units = np.arange(n_units) if growing else permutation(n_units, key(seed, UNITS, epoch))
    size = config.round_units or n_units
    return units[number * size : (number + 1) * size]


def deal(
    config: OrderConfig,
    seed: int,
    epoch: int,
    number: int,
    *,
    units: Int64[np.ndarray, " units"],
    rows: Int64[np.ndarray, " units"],
    slice_rows: int,
) -> Round:
    """Permutes all slices of the units and deals them: position p goes to lane p mod lanes."""
    slices = -(-rows // slice_rows)
    unit = np.repeat(units, slices)
    nth = np.arange(len(unit)) - np.repeat(np.cumsum(slices) - slices, slices)
    size = np.minimum(np.repeat(rows, slices) - nth * slice_rows, slice_rows)
    order = permutation(len(unit), key(seed, SLICES, epoch, number))
    lanes = []
    for lane in range(config.lanes):
        mine = order[lane :: config.lanes]
        lanes.append(Lane(unit[mine], nth[mine], np.concatenate([[0], np.cumsum(size[mine])])))
    return Round(epoch, number, units, tuple(lanes), int(rows.sum()))


def apportion(taken: int, lane_rows: Sequence[int]) -> list[int]:
    """How many rows each lane has given once the round has given `taken`: it never falls, and sums to `taken`.

    Row j of a lane with n rows is due at time (j + 1/2) / n; the first `taken` rows by time, ties by lane, are given.
    (The divisor method of Webster, house-monotone as all divisor methods are; Balinski and Young 1982.)
    """
    total = sum(lane_rows)
    assert 0 <= taken <= total, f"{taken} of {total} rows"
    if total == 0:
        return [0] * len(lane_rows)
    given = [(2 * taken * n + total) // (2 * total) for n in lane_rows]  # all rows due by taken / total
    surplus = sum(given) - taken
    while surplus > 0:
        _, lane = max((_due(given[i] - 1, n), i) for i, n in enumerate(lane_rows) if given[i] > 0)
        given[lane] -= 1
        surplus -= 1
    while surplus < 0:
        _, lane = min((_due(given[i], n), i) for i, n in enumerate(lane_rows) if given[i] < n)
        given[lane] += 1
        surplus += 1
    return given


def _due(row: int, n: int) -> int:
    """(row + 1/2) / n in units of 2^-128: exact enough to order any two lanes of fewer than 2^63 rows."""
    return ((2 * row + 1) << 127) // n


def window_rows(config: OrderConfig, lane: Lane, window: int) -> tuple[int, int]:
    """The rows [start, stop) of the lane that its window number `window` holds."""
    first = window * config.window
    return int(lane.start[first]), int(lane.start[min(first + config.window, len(lane.unit))])


def window_at(config: OrderConfig, lane: Lane, row: int) -> int:
    """The number of the window that row `row` of the lane belongs to."""
    return (int(np.searchsorted(lane.start, row, side="right")) - 1) // config.window


def window_permutation(
    config: OrderConfig, seed: int, round: Round, lane: int, window: int
) -> Int64[np.ndarray, " rows"]:
    """The order in which the rows of a window are served, as rows of the lane."""
    start, stop = window_rows(config, round.lanes[lane], window)
    return start + permutation(stop - start, key(seed, ROWS, round.epoch, round.number, lane, window))


def rows_by_slice(lane: Lane, rows: Int64[np.ndarray, " rows"]) -> list[SliceRows]:
    """Rows of a lane, ascending, as rows of its slices."""
    bounds = np.searchsorted(rows, lane.start)
    return [
        SliceRows(int(lane.unit[i]), int(lane.slice[i]), rows[bounds[i] : bounds[i + 1]] - lane.start[i])
        for i in np.flatnonzero(np.diff(bounds))
    ]


class RowPosition(NamedTuple):
    """A row of the endless sequence of rounds: `offset` rows into round `number` of `epoch`."""

    epoch: int
    number: int
    offset: int


def locate(row: int, config: OrderConfig, seed: int, n_units: int, row_counts: RowCounts) -> RowPosition:
    """The position of row number `row` of all epochs end to end; asks for row counts up to its own round only."""
    rounds = n_rounds(config, n_units)
    epoch = 0
    while True:
        before = row
        for number in range(rounds):
            size = int(row_counts(round_units(config, seed, n_units, epoch, number)).sum())
            if row < size:
                return RowPosition(epoch, number, row)
            row -= size
        epoch_rows = before - row
        if epoch_rows == 0:
            raise UserError(f"the {n_units} units hold no rows at all; harvest again (were all rows dropped?)")
        epoch += 1 + row // epoch_rows
        row %= epoch_rows


def fold(step: int, unit: Int64[np.ndarray, " rows"], row: Int64[np.ndarray, " rows"]) -> int:
    """The sum modulo 2^64 of a hash of (step, unit, row): whoever served the rows, parts of a step simply add.

    The step is in every term, so sums over steps prove the order too: order_hash after a step is the sum so far.
    """
    word = (unit.astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64)
    return int(mix64(mix64(word) ^ np.uint64(key(step))).sum(dtype=np.uint64)) & MASK
