"""Which positions become rows."""

import torch

from sae_dist.harvest.config import RowPolicy
from sae_dist.harvest.rows import eligible, row_mask


def test_the_first_position_and_separators_are_dropped():
    tokens = torch.tensor([[7, 0, 3, 4], [0, 5, 6, 0]])
    found = eligible(tokens, RowPolicy(), separator=0)
    assert found.tolist() == [[False, False, True, True], [False, True, True, False]]
    kept = eligible(tokens, RowPolicy(drop_first=0, drop_special=False), separator=0)
    assert kept.all()
    assert eligible(tokens, RowPolicy(drop_first=2), separator=None).tolist() == [[False, False, True, True]] * 2


def states(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed))


def test_a_massive_activation_is_an_outlier_and_an_ordinary_one_is_not():
    x, everywhere = states(), torch.ones(4, 8, dtype=torch.bool)
    x[2, 5] *= 100
    x[1, 3] *= 3
    kept = row_mask({"a": x}, everywhere, RowPolicy())
    assert (kept.outliers, kept.nonfinite) == (1, 0)
    assert (~kept.mask).nonzero().tolist() == [[2, 5]]
    assert row_mask({"a": x}, everywhere, RowPolicy(max_norm_ratio=None)).mask.all()


def test_the_median_is_of_candidates_only():
    x = states()
    x[:, 0] *= 1e4  # first positions, half of the rows of this unit of two positions
    candidates = torch.ones(4, 8, dtype=torch.bool)
    candidates[:, 0] = False
    x[3, 7] *= 100
    kept = row_mask({"a": x}, candidates, RowPolicy())
    assert kept.outliers == 1
    assert not kept.mask[:, 0].any()


def test_hook_points_lose_the_same_rows():
    a, b, everywhere = states(0), states(1), torch.ones(4, 8, dtype=torch.bool)
    a[0, 1] = float("nan")
    b[3, 2, 4] = float("inf")
    b[1, 1] *= 1000
    kept = row_mask({"a": a, "b": b}, everywhere, RowPolicy())
    assert (kept.nonfinite, kept.outliers) == (2, 1)
    assert (~kept.mask).nonzero().tolist() == [[0, 1], [1, 1], [3, 2]]


def test_nothing_but_nan_keeps_nothing_and_says_how_much():
    kept = row_mask({"a": torch.full((2, 3, 4), float("nan"))}, torch.ones(2, 3, dtype=torch.bool), RowPolicy())
    assert kept.nonfinite == 6
    assert not kept.mask.any()
