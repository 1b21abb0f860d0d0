"""How well rows are mixed: by how much a batch's mean of a document-level signal varies more than it should.

If a signal has one value per document, the mean over a batch with c_d rows of document d has variance
sigma^2 sum_d c_d^2 / batch^2. Were all rows of different documents it would be sigma^2 / batch.
"""

import numpy as np
from jaxtyping import Integer


def inflation(doc: Integer[np.ndarray, " batch"]) -> float:
    """sum_d c_d^2 / batch: 1 when all rows are of different documents, `batch` when all are of one."""
    counts = np.unique(doc, return_counts=True)[1].astype(np.float64)
    return float((counts**2).sum() / len(doc))
