"""Rows of a document are as far apart as the formula says, and at defaults nearly as far as independent draws."""

import numpy as np
import pytest

from sae_dist.shards import order, permutation, shuffle
from sae_dist.shards.order import OrderConfig

BATCH, DOCUMENT = 4096, 512


def served(config: OrderConfig, *, n_units: int, unit_rows: int, slice_rows: int, steps: int) -> list[np.ndarray]:
    """The documents in the first batches; documents of 512 rows, scattered in their unit as the writer does it."""
    counts = np.full(n_units, unit_rows)
    dealt = order.deal(config, 0, 0, 0, units=np.arange(n_units)[: config.round_units or n_units],
                       rows=counts[: config.round_units or n_units], slice_rows=slice_rows)  # fmt: skip
    scatter: dict[int, np.ndarray] = {}
    sizes = [lane.rows for lane in dealt.lanes]
    batches = []
    for step in range(steps):
        before, after = order.apportion(step * BATCH, sizes), order.apportion((step + 1) * BATCH, sizes)
        docs = []
        for number, lane in enumerate(dealt.lanes):
            start, stop = before[number], after[number]
            while start < stop:
                window = order.window_at(config, lane, start)
                first, last = order.window_rows(config, lane, window)
                rows = order.window_permutation(config, 0, dealt, number, window)[
                    start - first : min(stop, last) - first
                ]
                for piece in order.rows_by_slice(lane, np.sort(rows)):
                    if piece.unit not in scatter:
                        scatter[piece.unit] = permutation.permutation(unit_rows, permutation.key(0, piece.unit))
                    row = scatter[piece.unit][piece.slice * slice_rows + piece.rows]
                    docs.append((piece.unit * unit_rows + row) // DOCUMENT)
                start = min(stop, last)
        batches.append(np.concatenate(docs))
    return batches


def expected(
    config: OrderConfig, *, batch: int, document_rows: float, unit_rows: int, slice_rows: int, n_units: int
) -> float:
    """What `inflation` is for the order of order.py: 1 + (batch - 1) m / U (1 / N + (1 - 1 / S) / open slices).

    S slices a unit, N units a round; at most lanes x window slices are open. With one slice a unit, two rows of a
    slice are of the same unit as much as two rows of a unit are: only 1 / open slices remains.
    """
    units = min(config.round_units or n_units, n_units)
    slices = -(-unit_rows // slice_rows)
    open_slices = min(config.lanes * config.window, units * slices)
    same_slice = 1 / open_slices
    other_slice_same_unit = (1 - same_slice) * (slices - 1) / max(units * slices - 1, 1)
    return 1 + (batch - 1) * document_rows / unit_rows * (same_slice + other_slice_same_unit)


def test_inflation_is_one_for_strangers_and_the_batch_for_one_document():
    assert shuffle.inflation(np.arange(100, dtype=np.uint64)) == 1
    assert shuffle.inflation(np.zeros(100, np.uint64)) == 100
    assert shuffle.inflation(np.arange(100, dtype=np.uint64) // 4) == 4


def test_at_defaults_the_inflation_is_at_most_two_and_a_half():
    """20,000 documents of 512 tokens in units of 65,536 rows and slices of 8,192."""
    config, shape = OrderConfig(), dict(n_units=156, unit_rows=65_536, slice_rows=8192)
    batches = served(config, **shape, steps=6)
    measured = np.mean([shuffle.inflation(docs) for docs in batches])
    predicted = expected(config, batch=BATCH, document_rows=DOCUMENT, **shape)
    assert measured <= 2.5
    assert measured == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (OrderConfig(lanes=8, window=4, round_units=32), dict(n_units=64, unit_rows=16_384, slice_rows=2048)),
        (OrderConfig(lanes=4, window=1), dict(n_units=64, unit_rows=16_384, slice_rows=2048)),
        (OrderConfig(lanes=16, window=4), dict(n_units=64, unit_rows=16_384, slice_rows=16_384)),
    ],
)
def test_the_formula_holds(config, shape):
    measured = np.mean([shuffle.inflation(docs) for docs in served(config, **shape, steps=64)])
    predicted = expected(config, batch=BATCH, document_rows=DOCUMENT, **shape)
    assert measured == pytest.approx(predicted, rel=0.1)
