"""Rows with different numbers of latents, for kernels that take the same number of places a row.

Row r's first pairs fill line r; what it has beyond a line's width goes on in further lines, which come after all rows.
With lines twice as wide as the mean row there are never more than half as many further lines as rows, however unevenly
the pairs lie: [batch, n_latents] never comes about. How a row's pairs are cut depends on the width alone, so sums over
them have the same bits whichever rows are beside it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae_kernels import plain


class Lines(NamedTuple):
    """Where each pair stands; the first `rows` lines are those of row 0, 1, 2, ..."""

    rows: int
    width: int
    row: Int[Tensor, " pairs"]
    further: Int[Tensor, " further"]  # the row of each line after those, ascending
    line: Int[Tensor, " pairs"]
    place: Int[Tensor, " pairs"]

    def scatter(self, pairs: Shaped[Tensor, " pairs"]) -> Shaped[Tensor, "lines width"]:
        """One number a pair at its place; 0 at empty ones."""
        out = pairs.new_zeros(self.rows + len(self.further), self.width)
        return out.index_put_((self.line, self.place), pairs)

    def extended(self, of_rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "lines ..."]:
        """Every line's row."""
        return torch.cat([of_rows, of_rows[self.further]]) if len(self.further) else of_rows

    def padded(self, of_rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "lines ..."]:
        """The rows, and 0 in the further lines."""
        further = of_rows.new_zeros(len(self.further), *of_rows.shape[1:])
        return torch.cat([of_rows, further]) if len(further) else of_rows

    def summed(self, of_lines: Float[Tensor, "lines d_model"]) -> Float[Tensor, "rows d_model"]:
        """The sum of a row's lines, in their order."""
        if not len(self.further):
            return of_lines
        rows, n_lines = torch.unique_consecutive(self.further, return_counts=True)
        offsets = torch.nn.functional.pad(n_lines.cumsum(0), (1, 0))
        every = torch.arange(self.rows, len(of_lines), device=of_lines.device)
        out = of_lines[: self.rows].clone()
        out[rows] += plain.bag_sums(of_lines, every, torch.ones_like(every, dtype=of_lines.dtype), offsets)
        return out


def split_into_lines(row: Int[Tensor, " pairs"], *, rows: int, width: int) -> Lines:
    """Lines of `width` places for pairs in the order of their rows; a row's pairs keep their order."""
    counts = torch.bincount(row, minlength=rows)
    further = (counts - 1).clamp_min(0) // width
    nth = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    begin = rows + further.cumsum(0) - further  # a row's first further line
    line = torch.where(nth < width, row, begin[row] + nth // width - 1)
    numbers = torch.arange(rows, device=row.device)
    return Lines(rows, width, row, torch.repeat_interleave(numbers, further), line, nth % width)
