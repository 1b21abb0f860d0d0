"""The orders of sums that compact state depends on, against loops over single numbers."""

from itertools import zip_longest

import numpy as np
import pytest
import torch
from sae_kernels.ordered import chunk_sums, root, row_sums, sum_of_chunks


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("d_model", [1, 2, 7, 576])
def test_a_row_is_added_by_folding_it_in_halves(d_model):
    x = normal(3, d_model)

    def added(numbers: list[np.float32]) -> np.float32:
        if len(numbers) == 1:
            return numbers[0]
        half = (len(numbers) + 1) // 2
        return added([a + b for a, b in zip_longest(numbers[:half], numbers[half:], fillvalue=np.float32(0))])

    assert row_sums(x).squeeze(1).tolist() == [float(added(list(row))) for row in x.numpy()]


@pytest.mark.parametrize("rows", [1, 63, 65, 64 * 64 + 5])
def test_rows_are_added_by_chunks_of_64_and_those_likewise(rows):
    x = normal(rows, 2).double() * 1e-3 + 1

    def added(numbers: np.ndarray) -> np.ndarray:
        chunks = [numbers[start : start + 64] for start in range(0, len(numbers), 64)]
        sums = np.stack([np.add.accumulate(chunk)[-1] for chunk in chunks])  # one after the other
        return sums[0] if len(sums) == 1 else added(sums)

    assert (sum_of_chunks(chunk_sums(x)).numpy() == added(x.numpy())).all()


def test_roots_are_rounded_to_the_nearest():
    x = normal(100_000).square() * torch.logspace(-30, 30, 100_000)
    found, x = root(x).double(), x.double()
    below, above = (torch.nextafter(found.float(), torch.tensor(to)).double() for to in (0.0, torch.inf))
    # r is the nearest if x lies between the squares of the midpoints to its neighbours, exact enough in fp64
    assert bool((((below + found) / 2).square() <= x).all() and (((found + above) / 2).square() >= x).all())
