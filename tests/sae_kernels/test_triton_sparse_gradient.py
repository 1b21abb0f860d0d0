import pytest
import torch
from sae_kernels import reference
from sae_kernels.triton_sparse_decode import decode, gather_dot
from sae_kernels.triton_sparse_gradient import row_gradient, segments

SHAPES = [(1, 8, 4, 1), (5, 64, 19, 4), (7, 30, 130, 30)]  # batch, n_latents, d_model, k


def sparse(batch, n_latents, d_model, k, device, *, seed=0):
    """A selection with distinct indices a row, one empty row and one empty place; rows of x and of W_dec."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, n_latents, generator=generator).argsort(1)
    values = torch.rand(batch, k, generator=generator) + 0.1
    values[-1, -1] = 0.0
    if batch > 2:
        values[1] = 0.0
    x, W = (torch.randn(rows, d_model, generator=generator) for rows in (batch, n_latents))
    return values.to(device), order[:, :k].contiguous().to(device), x.to(device), W.to(device)


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
def test_decode_and_its_residual_match_the_reference(device, batch, n_latents, d_model, k):
    values, indices, x, W = sparse(batch, n_latents, d_model, k, device)
    expected = reference.sparse_decode(values.double(), indices, W.double(), x[0].double())
    ours = decode(values, indices, W, x[0])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(values, indices, W, x[0], residual_of=x), x - ours, rtol=1e-5, atol=1e-5)


def test_an_index_without_a_value_is_never_read(device):
    values = torch.tensor([[2.0, 0.0]], device=device)
    W = torch.tensor([[1.0, 3.0], [float("nan"), 0.0]], device=device)
    assert decode(values, torch.tensor([[0, 1]], device=device), W, None).tolist() == [[2.0, 6.0]]


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
def test_gather_dot_matches_the_reference(device, batch, n_latents, d_model, k):
    _, indices, x, W = sparse(batch, n_latents, d_model, k, device)
    expected = reference.gather_dot(x.double(), W.double(), indices)
    torch.testing.assert_close(gather_dot(x, W, indices).double(), expected, rtol=1e-5, atol=1e-5)
    wide = torch.cat([x, x], 1)[:, :d_model]  # rows further apart than they are long
    torch.testing.assert_close(gather_dot(wide, W, indices).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch, n_latents, d_model, k", SHAPES)
def test_row_gradients_equal_autograd_and_are_the_same_twice(device, batch, n_latents, d_model, k):
    values, indices, x, W = sparse(batch, n_latents, d_model, k, device)
    W = W.double().requires_grad_()
    x_hat = reference.sparse_decode(values.double(), indices, W, W.new_zeros(d_model))
    (expected,) = torch.autograd.grad(x_hat, W, x.double())
    by_latent = segments(values, indices, n_latents=n_latents)
    ours, sums = row_gradient(x, values, by_latent, n_latents=n_latents, with_sum=True)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    expected_sums = torch.zeros(n_latents, device=device).index_add_(0, indices.flatten(), values.flatten())
    torch.testing.assert_close(sums, expected_sums)
    again, _ = row_gradient(x, values, by_latent, n_latents=n_latents)
    assert torch.equal(again, ours)


def test_segments_list_every_active_pair_once_in_the_order_of_tokens(device):
    values = torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 5.0]], device=device)
    indices = torch.tensor([[3, 0], [3, 0], [0, 3]], device=device)
    pairs, offsets = segments(values, indices, n_latents=5)
    assert offsets.tolist() == [0, 3, 3, 3, 5, 5]
    assert pairs[:5].tolist() == [1, 3, 4, 0, 5]


def test_places_from_the_split_on_take_the_second_rows(device):
    values, indices, x, _ = sparse(4, 12, 8, 3, device)
    rows = torch.cat([x, -2 * x])
    weights = torch.where(torch.arange(3, device=device) >= 2, -2 * values, values)
    by_latent = segments(values, indices, n_latents=12)
    ours, _ = row_gradient(rows, values, by_latent, n_latents=12, split=2, shift=4)
    expected, _ = row_gradient(x, weights, by_latent, n_latents=12)
    torch.testing.assert_close(ours, expected)
