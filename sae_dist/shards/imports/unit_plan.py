"""Which rows of the source make which unit: known before anything is written, the same at every start.

Held-out rows are a sample of the whole source, in the share that was asked for: the source is cut into equal strata,
and each gives one run of neighbouring rows, at a place drawn by the seed. Runs, because neighbours are often of one
document; at least 64 of them, because files are often sorted. The other rows, in their order, are trained on.
"""

from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Int64

from sae_dist.shards.permutation import key, mix64

MIN_RUNS = 64  # at least, if there are so many rows
MAX_RUN_ROWS = 256  # at most
MIN_HELDOUT_ROWS = 64  # held-out rows that a figure needs, unless they would be more than a fifth of all


class RowRuns(NamedTuple):
    """Rows of a source, ascending, as runs of neighbours."""

    start: Int64[np.ndarray, " runs"]
    length: Int64[np.ndarray, " runs"]

    @property
    def rows(self) -> int:
        return int(self.length.sum())

    def cut(self, part: int, parts: int) -> list[tuple[int, int]]:
        """The ranges of the source that make one of `parts` parts; their sizes differ by one row at most."""
        first, last = self.rows * part // parts, self.rows * (part + 1) // parts
        before = np.cumsum(self.length) - self.length  # rows of earlier runs
        begin, end = np.maximum(first - before, 0), np.minimum(last - before, self.length)
        some = begin < end
        return list(zip((self.start + begin)[some].tolist(), (self.start + end)[some].tolist(), strict=True))

    def others(self, rows: int) -> Self:
        """The rest of `rows` rows."""
        stop = self.start + self.length
        start = np.concatenate([[0], stop])
        return type(self)(start, np.concatenate([self.start, [rows]]) - start)


def sample(rows: int, wanted: int, seed: int) -> RowRuns:
    """`wanted` of `rows` rows, spread over all of them."""
    run = min(max(wanted // MIN_RUNS, 1), MAX_RUN_ROWS)
    edges = np.arange(-(-wanted // run) + 1)
    strata = max(len(edges) - 1, 1)
    first, size = rows * edges[:-1] // strata, np.diff(rows * edges // strata)
    length = np.minimum(np.diff(wanted * edges // strata), size)
    word = mix64(edges[:-1].astype(np.uint64) ^ np.uint64(key(seed)))
    return RowRuns(first + (word % (size - length + 1).astype(np.uint64)).astype(np.int64), length)


class ImportPlan:
    """Units 0 to `train_units` - 1 are trained on, `heldout_units` more are held out."""

    def __init__(self, rows: int, *, unit_rows: int, heldout_fraction: float, seed: int):
        """unit_rows: rows of a unit at most; 0 chooses. heldout_fraction: of the rows, at least MIN_HELDOUT_ROWS."""
        self.unit_rows = unit_rows or min(65_536, max(-(-rows // 64), min(1024, -(-rows // 4))))
        least = max(min(MIN_HELDOUT_ROWS, rows // 5), 1)
        heldout = min(max(round(heldout_fraction * rows), least), rows - 1) if heldout_fraction else 0
        self._heldout = sample(rows, heldout, seed)
        self._train = self._heldout.others(rows)
        self.train_units, self.heldout_units = (
            -(-part.rows // self.unit_rows) for part in (self._train, self._heldout)
        )

    @property
    def units(self) -> int:
        return self.train_units + self.heldout_units

    def ranges(self, unit: int) -> list[tuple[int, int]]:
        """The rows [start, stop) of the source that make the unit."""
        if unit < self.train_units:
            return self._train.cut(unit, self.train_units)
        return self._heldout.cut(unit - self.train_units, self.heldout_units)


def row_numbers(ranges: list[tuple[int, int]]) -> Int64[np.ndarray, " rows"]:
    """Every row of the ranges."""
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])
