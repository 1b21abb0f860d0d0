"""The active latents of one dictionary on all rows, on disk: by row, and by latent. Sums over pairs are made of them.

    latent.bin, value.bin     int32, float32: every activation, by row
    PART/latent, row, value   int32, int32, float32: those of some rows, by latent, then by row

That is 20 bytes an activation. In memory are 8 bytes a row and 40 a latent, and one part while it is sorted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32
from sae_kernels import Active
from torch import Tensor

PART_ROWS = 1 << 16  # a part ends with the batch that brings it to so many rows
CONSTANT = 1e-12  # share of the mean square below which a variance is rounding


class Entries(NamedTuple):
    """Activations, by latent, then by row."""

    latent: Int32[np.ndarray, " n"]
    row: Int32[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]


@dataclass(frozen=True)
class Activations:
    """All rows of a dictionary, after `Writer.close`."""

    n_latents: int
    firings: Int[Tensor, " n_latents"]  # rows on which the latent is active
    mean: Float[Tensor, " n_latents"]  # over all rows, fp64
    std: Float[Tensor, " n_latents"]  # over all rows, fp64; 0 of one that does not vary
    offsets: Int[np.ndarray, " rows_1"]  # row r has latent[offsets[r] : offsets[r + 1]]
    latent: Int32[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]
    parts: tuple[Entries, ...]

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def fires(self) -> Tensor:
        """Whether each latent is ever active, bool [n_latents]."""
        return self.firings > 0

    def of_latents(self, latents: range) -> Iterator[Entries]:
        """The activations of neighbouring latents, by latent within each of some groups of rows."""
        for part in self.parts:
            low, high = np.searchsorted(part.latent, [latents.start, latents.stop])
            if low < high:
                yield Entries(*(column[low:high] for column in part))

    def of_rows(self, first: int, last: int) -> Active:
        """The active latents of the rows from `first` to before `last`."""
        begin, end = self.offsets[first], self.offsets[last]
        offsets = torch.from_numpy(self.offsets[first : last + 1] - begin)
        latent = torch.from_numpy(self.latent[begin:end].astype(np.int64))
        return Active(torch.from_numpy(np.array(self.value[begin:end])), latent, offsets)


class Writer:
    """Takes the rows of a dictionary batch by batch."""

    def __init__(self, folder: Path, n_latents: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._n = folder, n_latents
        for name in ("latent", "value"):
            (folder / f"{name}.bin").touch()
        self._firings = torch.zeros(n_latents, dtype=torch.int64)
        self._total, self._squares = torch.zeros(2, n_latents, dtype=torch.float64)
        self._lengths: list[np.ndarray] = []
        self._part: list[Entries] = []
        self._rows = self._begun = self._parts = 0

    def add(self, active: Active) -> None:
        """The next rows."""
        latent, value = active.indices.cpu(), active.values.float().cpu()
        self._firings += latent.bincount(minlength=self._n)
        self._total.index_add_(0, latent, value.double())
        self._squares.index_add_(0, latent, value.double().square())
        own = Entries(latent.int().numpy(), (active.rows.cpu() + self._rows).int().numpy(), value.numpy())
        for name in ("latent", "value"):
            with (self._folder / f"{name}.bin").open("ab") as file:
                file.write(getattr(own, name).data)
        self._lengths.append(active.offsets.diff().cpu().numpy())
        self._part.append(own)
        self._rows += len(active.offsets) - 1
        if self._rows - self._begun >= PART_ROWS:
            self._sort()

    def close(self) -> Activations:
        """After the last rows."""
        self._sort()
        mean, square = self._total / max(self._rows, 1), self._squares / max(self._rows, 1)
        variance = square - mean.square()
        std = torch.where(variance > CONSTANT * square, variance.clamp(min=0).sqrt(), 0.0)
        offsets = np.concatenate([[0], *self._lengths]).astype(np.int64).cumsum()
        return Activations(
            self._n, self._firings, mean, std, offsets, _mapped(self._folder / "latent.bin", np.int32),
            _mapped(self._folder / "value.bin", np.float32), tuple(map(self._read, range(self._parts))),
        )  # fmt: skip

    def _sort(self) -> None:
        """Writes what has come since the last part."""
        self._begun = self._rows
        columns = [np.concatenate(column) for column in zip(*self._part, strict=True)]
        self._part = []
        if not columns or not columns[0].size:
            return
        order = np.argsort(columns[0], kind="stable")
        folder = self._folder / f"{self._parts:06d}"
        folder.mkdir()
        for name, column in zip(Entries._fields, columns, strict=True):
            np.save(folder / f"{name}.npy", column[order])
        self._parts += 1

    def _read(self, part: int) -> Entries:
        folder = self._folder / f"{part:06d}"
        return Entries(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Entries._fields))


def _mapped(path: Path, kind: type) -> np.ndarray:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)
