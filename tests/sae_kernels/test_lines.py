"""Rows with different numbers of pairs in lines of one width."""

import pytest
import torch
from sae_kernels.lines import split_into_lines


@pytest.mark.parametrize(
    "counts", [[3, 0, 1, 2], [0, 0, 0], [1], [0, 40, 0, 1, 0], [7, 7, 7], [0] * 30 + [60], []], ids=str
)
def test_every_pair_has_a_place_and_sums_over_lines_are_sums_over_rows(counts):
    rows = len(counts)
    row = torch.arange(rows).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    width = max(-(-2 * len(row) // max(rows, 1)), 1)
    lines = split_into_lines(row, rows=rows, width=width)
    numbers = torch.arange(1, len(row) + 1)
    laid = lines.scatter(numbers)
    assert torch.equal(laid[laid > 0].sort().values, numbers)
    assert torch.equal(laid[lines.line, lines.place], numbers)
    assert len(laid) <= 1.5 * rows
    owner = lines.extended(torch.arange(rows))
    assert torch.equal(owner[lines.line], row)
    per_line = torch.randint(-9, 9, (len(laid), 5), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.zeros(rows, 5).index_add_(0, owner, per_line)
    assert torch.equal(lines.summed(per_line), expected)
    assert torch.equal(lines.padded(torch.ones(rows, 2)).sum(), torch.tensor(2.0 * rows))


def test_a_rows_pairs_keep_their_order():
    lines = split_into_lines(torch.tensor([0, 0, 0, 0, 0, 2]), rows=3, width=4)
    assert lines.scatter(torch.tensor([1, 2, 3, 4, 5, 6])).tolist() == [
        [1, 2, 3, 4],
        [0] * 4,
        [6, 0, 0, 0],
        [5, 0, 0, 0],
    ]
