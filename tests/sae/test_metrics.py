"""FVU, L0, cosine and dead share, against numbers worked by hand."""

import pytest
import torch

from sae_dist.sae.metrics import figures, sums

X = torch.tensor([[1.0, 0], [3, 0], [1, 2], [3, 2]])  # mean (2, 1); sum ||x - mean||^2 = 8


def of(x_hat, values, indices):
    return sums(x_hat=x_hat, x=X, active=indices[values > 0], n_latents=4)


def test_figures_worked_by_hand():
    values = torch.tensor([[1.0, 0], [2, 1], [1, 0], [3, 0]])
    indices = torch.tensor([[0, 3], [0, 1], [1, 3], [0, 3]])
    found = figures(of(X + torch.tensor([1.0, 0]), values, indices))
    assert found.fvu == pytest.approx(4 / 8)
    assert found.l0 == pytest.approx(5 / 4)
    assert found.dead_fraction == pytest.approx(2 / 4)  # 2 never, 3 only with value 0
    assert found.density.tolist() == [0.75, 0.5, 0, 0]
    assert found.tokens == 4


def test_perfect_is_zero_and_the_mean_is_one():
    nothing = torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.int64)
    assert figures(of(X, *nothing)).fvu == 0
    assert figures(of(X, *nothing)).cosine == pytest.approx(1)
    assert figures(of(X.mean(0).expand_as(X), *nothing)).fvu == pytest.approx(1)


def test_sums_of_parts_are_the_sums_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(2, 30, 5, generator=generator).unbind()
    values, indices = torch.rand(30, 3, generator=generator), torch.randint(9, (30, 3), generator=generator)

    def part(rows):
        return sums(x[rows], x_hat[rows], active=indices[rows][values[rows] > 0.5], n_latents=9)

    whole, parts = figures(part(slice(None))), figures(part(slice(0, 11)) + part(slice(11, None)))
    assert parts[:5] == pytest.approx(whole[:5])
    assert torch.equal(parts.density, whole.density)


def test_a_constant_offset_of_the_data_does_not_change_the_fvu():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator)
    x_hat = x + 0.1 * torch.randn(40, 6, generator=generator)
    nothing = {"active": torch.zeros(0, dtype=torch.int64), "n_latents": 1}
    assert figures(sums(x + 1000, x_hat + 1000, **nothing)).fvu == pytest.approx(
        figures(sums(x, x_hat, **nothing)).fvu, rel=1e-3
    )
