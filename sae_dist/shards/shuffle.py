"""How well rows are mixed: by how much a batch's mean of a document-level signal varies more than it should.

If a signal has one value per document, the mean over a batch with c_d rows of document d has variance
sigma^2 sum_d c_d^2 / batch^2. Were all rows of different documents it would be sigma^2 / batch.
"""

import numpy as np
from jaxtyping import Integer

from sae_dist.shards.order import OrderConfig


def inflation(doc: Integer[np.ndarray, " batch"]) -> float:
    """sum_d c_d^2 / batch: 1 when all rows are of different documents, `batch` when all are of one."""
    counts = np.unique(doc, return_counts=True)[1].astype(np.float64)
    return float((counts**2).sum() / len(doc))


def independent(*, batch: int, document_rows: float, rows: int) -> float:
    """What `inflation` is for rows drawn independently from a store: 1 + (batch - 1) m / rows."""
    return 1 + (batch - 1) * document_rows / rows


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
