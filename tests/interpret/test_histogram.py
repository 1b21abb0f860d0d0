"""Histograms whose range grows equal those of a single pass that knows the range."""

import numpy as np
import torch

from sae_dist.interpret import histogram


def test_exponent_is_the_smallest_power_of_two_above():
    values = torch.tensor([0.0, 0.5, 0.75, 1.0, 3.0, 4.0])
    assert histogram.exponents(values).tolist() == [histogram.UNSEEN, 0, 0, 1, 2, 3]


def test_bins_are_those_of_division():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 7 + 1e-6
    exponent = torch.full((1000,), 3)
    exact = np.floor(values.double().numpy() / 8 * histogram.N_BINS)
    assert np.array_equal(histogram.bins(values, exponent).numpy(), exact)


def test_widening_is_exact_for_every_shift():
    values = torch.rand(5000, generator=torch.Generator().manual_seed(1)) + 1e-9
    for shift in (1, 2, 5, 6, 7, 20):
        counts = histogram.bins(values, torch.zeros(5000, dtype=torch.int64)).bincount(minlength=histogram.N_BINS)[None]
        histogram.widen_(counts, torch.tensor([0]), shift=shift)
        direct = histogram.bins(values, torch.full((5000,), shift)).bincount(minlength=histogram.N_BINS)
        assert torch.equal(counts[0], direct)
