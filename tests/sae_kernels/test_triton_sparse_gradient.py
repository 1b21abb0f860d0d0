import pytest
import torch
from sae_kernels import reference
from sae_kernels.reference import EMPTY
from sae_kernels.triton_sparse_decode import decode, gather_dot
from sae_kernels.triton_sparse_gradient import row_gradient, segments

SHAPES = [(1, 8, 4, 1), (5, 64, 19, 4), (7, 30, 130, 30)]  # batch, n_latents, d_model, k


def sparse(batch, n_latents, d_model, k, device, *, seed=0):
    """Values of any sign with distinct indices a row, one empty row, one empty place; rows of x and of W_dec."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, n_latents, generator=generator).argsort(1)
    values = torch.rand(batch, k, generator=generator) + 0.1
    indices = order[:, :k].contiguous()
    values[::2] *= -1
    empty = torch.zeros_like(indices, dtype=torch.bool)
    empty[-1, -1] = True
    if batch > 2:
        empty[1] = True
        values[2, 0] = 0.0  # a pair that is worth nothing is a pair
    values, indices = values.masked_fill(empty, 0.0), indices.masked_fill(empty, EMPTY)
    x, W = (torch.randn(rows, d_model, generator=generator) for rows in (batch, n_latents))
    return values.to(device), indices.to(device), x.to(device), W.to(device)


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
def test_decode_and_its_residual_match_the_reference(device, batch, n_latents, d_model, k):
    values, indices, x, W = sparse(batch, n_latents, d_model, k, device)
    expected = reference.sparse_decode(values.double(), indices, W.double(), x[0].double())
    ours = decode(values, indices, W, x[0])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(values, indices, W, x[0], residual_of=x), x - ours, rtol=1e-5, atol=1e-5)


def test_an_empty_place_is_never_read(device):
    values, indices = torch.tensor([[0.0, -2.0]], device=device), torch.tensor([[EMPTY, 1]], device=device)
    W = torch.tensor([[float("nan"), 0.0], [1.0, 3.0]], device=device)
    assert decode(values, indices, W, None).tolist() == [[-2.0, -6.0]]
    assert gather_dot(torch.ones(1, 2, device=device), W, indices).tolist() == [[0.0, 4.0]]


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
def test_gather_dot_matches_the_reference(device, batch, n_latents, d_model, k):
    _, indices, x, W = sparse(batch, n_latents, d_model, k, device)
    expected = reference.gather_dot(x.double(), W.double(), indices) * (indices >= 0)
    torch.testing.assert_close(gather_dot(x, W, indices).double(), expected, rtol=1e-5, atol=1e-5)
    source = torch.randint(2 * batch, indices.shape, generator=torch.Generator().manual_seed(1)).to(device)
    rows = torch.cat([x, -3 * x])
    expected_from = torch.einsum("bkd,bkd->bk", rows[source].double(), W[indices].double()) * (indices >= 0)
    ours = gather_dot(rows, W, indices, source=source).double()
    torch.testing.assert_close(ours, expected_from, rtol=1e-5, atol=1e-5)
    wide = torch.cat([x, x], 1)[:, :d_model]  # rows further apart than they are long
    torch.testing.assert_close(gather_dot(wide, W, indices).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
def test_row_gradients_equal_autograd_and_are_the_same_twice(device, batch, n_latents, d_model, k):
    values, indices, x, W = sparse(batch, n_latents, d_model, k, device)
    W = W.double().requires_grad_()
    x_hat = reference.sparse_decode(values.double(), indices, W, W.new_zeros(d_model))
    (expected,) = torch.autograd.grad(x_hat, W, x.double())
    by_latent = segments(indices, n_latents=n_latents)
    ours, sums = row_gradient(x, values, by_latent, n_latents=n_latents, with_sum=True)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    expected_sums = torch.zeros(n_latents, device=device).index_add_(
        0, indices.clamp_min(0).flatten(), values.flatten()
    )
    torch.testing.assert_close(sums, expected_sums)
    again, _ = row_gradient(x, values, by_latent, n_latents=n_latents)
    assert torch.equal(again, ours)


def test_segments_list_every_active_pair_once_in_the_order_of_tokens(device):
    indices = torch.tensor([[3, 0], [EMPTY, 0], [0, 3]], device=device)
    pairs, offsets = segments(indices, n_latents=5)
    assert offsets.tolist() == [0, 3, 3, 3, 5, 5]
    assert pairs[:5].tolist() == [1, 3, 4, 0, 5]


def test_each_pair_takes_the_row_that_it_says(device):
    values, indices, x, _ = sparse(4, 12, 8, 3, device)
    rows, row = torch.cat([x, -2 * x, 5 * x]), torch.arange(4, device=device)[:, None]
    term = torch.tensor([[0, 2, 1]], device=device).expand(4, 3)
    by_latent = segments(indices, n_latents=12)
    ours, _ = row_gradient(rows, values, by_latent, n_latents=12, source=(row + 4 * term).int())
    weights = values * torch.tensor([1.0, 5.0, -2.0], device=device)
    expected, _ = row_gradient(x, weights, by_latent, n_latents=12)
    torch.testing.assert_close(ours, expected)
