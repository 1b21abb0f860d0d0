"""Rows with different numbers of pairs, stored in lines of equal width, which is what kernels read.

Line r has the first pairs of row r. Pairs beyond the width go to further lines, which come after the lines of all rows.
With lines twice as wide as the mean row there are at most half as many further lines as rows, however uneven the rows
are, so nothing grows to [batch, n_latents]. How a row is split depends on the width alone, so its sums have the same
bits whatever the other rows are.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae_kernels import plain
from sae_kernels.reference import EMPTY, Selected


class Lines(NamedTuple):
    """The line and place of every pair; line r < `rows` belongs to row r."""

    rows: int
    width: int
    row: Int[Tensor, " pairs"]
    further: Int[Tensor, " further"]  # the row of each line after those, ascending
    line: Int[Tensor, " pairs"]
    place: Int[Tensor, " pairs"]

    def scatter(self, pairs: Shaped[Tensor, " pairs"], *, empty: int = 0) -> Shaped[Tensor, "lines width"]:
        """Puts one number per pair at its place; other places are `empty`."""
        out = pairs.new_full((self.rows + len(self.further), self.width), empty)
        return out.index_put_((self.line, self.place), pairs)

    def selected(self, values: Float[Tensor, " pairs"], indices: Int[Tensor, " pairs"]) -> Selected:
        """Pairs at their places."""
        return Selected(self.scatter(values), self.scatter(indices, empty=EMPTY))

    def extended(self, of_rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "lines ..."]:
        """For every line its row's entry of `of_rows`."""
        return torch.cat([of_rows, of_rows[self.further]]) if len(self.further) else of_rows

    def padded(self, of_rows: Shaped[Tensor, "rows ..."], *, empty: int = 0) -> Shaped[Tensor, "lines ..."]:
        """`of_rows` for the first lines, `empty` for the further ones."""
        further = of_rows.new_full((len(self.further), *of_rows.shape[1:]), empty)
        return torch.cat([of_rows, further]) if len(further) else of_rows

    def summed(self, of_lines: Float[Tensor, "lines d_model"]) -> Float[Tensor, "rows d_model"]:
        """For every row the sum of its lines, added in their order."""
        if not len(self.further):
            return of_lines
        rows, n_lines = torch.unique_consecutive(self.further, return_counts=True)
        offsets = torch.nn.functional.pad(n_lines.cumsum(0), (1, 0))
        every = torch.arange(self.rows, len(of_lines), device=of_lines.device)
        out = of_lines[: self.rows].clone()
        out[rows] += plain.bag_sums(of_lines, every, torch.ones_like(every, dtype=of_lines.dtype), offsets)
        return out


def split_into_lines(row: Int[Tensor, " pairs"], *, rows: int, width: int) -> Lines:
    """Lines of `width` places for pairs that are sorted by `row`; a row's pairs keep their order."""
    counts = torch.bincount(row, minlength=rows)
    further = (counts - 1).clamp_min(0) // width
    nth = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    begin = rows + further.cumsum(0) - further  # a row's first further line
    line = torch.where(nth < width, row, begin[row] + nth // width - 1)
    numbers = torch.arange(rows, device=row.device)
    return Lines(rows, width, row, torch.repeat_interleave(numbers, further), line, nth % width)
