"""Matrices in Parquet files: a column of lists of any kind, read forward, each row group decoded once a pass."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards.imports.matrix import Matrix, chosen

BATCH_BYTES = 16 << 20  # decoded at a time: a row group may be larger than memory


def of_parquet(path: Path, key: str) -> Matrix:
    """One column; [n, width] in every cell is n rows."""
    file = pq.ParquetFile(
        path, buffer_size=1 << 20, pre_buffer=False,  # else a whole row group comes into memory
        page_checksum_verification=True,
    )  # fmt: skip
    column = chosen(path, key, [field.name for field in file.schema_arrow if _is_list(field.type)])
    if file.metadata.num_rows == 0:
        raise UserError(f"path={path} has no rows")
    cells = _Cells(path, file, column)
    first = next(cells.batches(0, cells=1))
    per_cell, width = first.shape[1:]
    reader = _Forward(cells, per_cell, width, first.dtype)
    return Matrix(column, file.metadata.num_rows * per_cell, width, torch.from_numpy(first).dtype, reader.read)


class _Cells:
    """The cells of a column as arrays [cells, rows of a cell, width]."""

    def __init__(self, path: Path, file: pq.ParquetFile, column: str):
        self.path, self.file, self.column = path, file, column
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])  # the first cell of each row group

    def batches(self, group: int, *, cells: int) -> Iterator[Float[np.ndarray, "cells rows width"]]:
        """All from that row group on, at most so many cells at a time."""
        groups = list(range(group, self.file.num_row_groups))
        for batch in self.file.iter_batches(batch_size=cells, row_groups=groups, columns=[self.column]):
            if batch.num_rows:
                yield self._array(batch.column(self.column))

    def _array(self, values: pa.Array) -> Float[np.ndarray, "cells rows width"]:
        cells, whole, axes = len(values), values.type, []
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        while _is_list(values.type):
            lengths = pc.call_function("list_value_length", [values]).unique()
            if values.null_count or len(lengths) != 1:
                raise self.refusal("lists of different lengths, or nulls")
            axes.append(lengths[0].as_py())
            values = values.flatten()
        if values.null_count or not pa.types.is_floating(values.type):
            raise self.refusal(f"{values.type} with {values.null_count} nulls")
        if isinstance(whole, pa.FixedShapeTensorType):  # its storage is flat
            if whole.permutation not in (None, sorted(whole.permutation or [])):
                raise self.refusal(f"arrays with permuted axes {whole.permutation}")
            axes = list(whole.shape)
        flat = values.to_numpy(zero_copy_only=False)
        return np.array(flat).reshape(cells, int(np.prod(axes[:-1])), axes[-1])

    def refusal(self, found: str) -> UserError:
        return UserError(
            f"path={self.path} column {self.column} holds {found}; each cell has to be a list of floats of one length"
        )


class _Forward:
    """Rows by number; going forward decodes everything once, going back begins at the row group again."""

    def __init__(self, cells: _Cells, per_cell: int, width: int, dtype: np.dtype):
        self._cells, self._cell = cells, (per_cell, width)
        self._starts = cells.starts * per_cell  # the first row of each row group
        self._batch = max(1, BATCH_BYTES // max(per_cell * width * dtype.itemsize, 1))
        self._batches: Iterator[np.ndarray] = cells.batches(0, cells=self._batch)
        self._at, self._rows = 0, np.empty((0, width), dtype)  # decoded rows that are not yet passed

    def read(self, start: int, stop: int) -> Float[Tensor, "rows width"]:
        group = int(np.searchsorted(self._starts, start, "right")) - 1
        if start < self._at or self._starts[group] > self._at + len(self._rows):
            self._batches = self._cells.batches(group, cells=self._batch)
            self._at, self._rows = int(self._starts[group]), self._rows[:0]
        parts = []
        while start < stop:
            while start >= self._at + len(self._rows):
                self._at += len(self._rows)
                self._rows = self._rows_of(next(self._batches))
            parts.append(self._rows[start - self._at : stop - self._at])
            start += len(parts[-1])
        return torch.from_numpy(np.concatenate(parts))

    def _rows_of(self, cells: Float[np.ndarray, "cells rows width"]) -> Float[np.ndarray, "cells*rows width"]:
        if cells.shape[1:] != self._cell:
            raise self._cells.refusal(f"arrays of shape {self._cell} and {cells.shape[1:]}")
        return cells.reshape(-1, cells.shape[-1])


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(is_kind(kind) for is_kind in kinds)
