"""Labels of latents, where a run has them: a Parquet table with the columns `latent` and `label`."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LABELS = "labels"  # folder of a run


def labels_of(file: pa.NativeFile, latents: Sequence[int]) -> pa.StringArray:
    """The labels of `latents`, in their order; null where one has none."""
    wanted = np.asarray(latents, np.int64)
    first, last = (int(wanted.min()), int(wanted.max())) if len(wanted) else (0, -1)
    within = [("latent", ">=", first), ("latent", "<=", last)]  # other row groups are not read
    table = pq.read_table(file, columns=["latent", "label"], filters=within)
    place = np.full(last + 1, -1)
    place[table["latent"].to_numpy()] = np.arange(len(table))
    return table["label"].take(pa.array(place[wanted], mask=place[wanted] < 0)).combine_chunks().cast(pa.string())
