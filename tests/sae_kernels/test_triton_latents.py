import pytest
import torch
from sae_kernels import reference
from sae_kernels.triton_latents import ParameterState, WeightedPairs, schedule_row, update_latents_
from sae_kernels.triton_sparse_gradient import row_gradient, segments

BETAS, EPS = (0.9, 0.999), 6.25e-10


def fresh(n_latents, d_model, device, *, unit):
    value = torch.randn(n_latents, d_model, generator=torch.Generator().manual_seed(3))
    value = (reference.unit_norm(value) if unit else value).to(device)
    return ParameterState(value, torch.zeros_like(value), torch.zeros_like(value))


def schedule_of(steps, device):
    rows = [schedule_row(step=max(step, 1), lr=1e-2 / max(step, 1), betas=BETAS) for step in range(steps + 1)]
    return torch.tensor(rows, device=device)


def pairs_of(step, n_latents, d_model, device):
    """Two tokens with two latents each, so that most latents have none."""
    generator = torch.Generator().manual_seed(step)
    indices = torch.rand(2, n_latents, generator=generator).argsort(1)[:, :2].to(device)
    weights = torch.randn(2, 2, generator=generator).to(device)
    rows = torch.randn(2, d_model, generator=generator).to(device)
    return WeightedPairs(rows, weights, segments(indices, n_latents=n_latents))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("d_model", [8, 19])
@pytest.mark.parametrize("dense", [False, True])
def test_an_update_is_projection_adam_and_unit_norm(device, unit, d_model, dense):
    n_latents, steps = 9, 3
    parameter, twin = fresh(n_latents, d_model, device, unit=unit), fresh(n_latents, d_model, device, unit=unit)
    bias = ParameterState(*(torch.zeros(n_latents, device=device) for _ in range(3)))
    twin_bias = ParameterState(*(torch.zeros(n_latents, device=device) for _ in range(3)))
    rounded = torch.empty(n_latents, d_model, dtype=torch.bfloat16, device=device)
    norms, d_bias = torch.empty(n_latents, device=device), torch.empty(n_latents, device=device)
    schedule = schedule_of(steps, device)
    for step in range(1, steps + 1):
        pairs = pairs_of(step, n_latents, d_model, device)
        gradient, sums = row_gradient(pairs.rows, pairs.weights, pairs.by_latent, n_latents=n_latents, with_sum=True)
        if dense:
            d_bias.copy_(sums)
        update_latents_(
            parameter, gradient if dense else pairs, schedule=schedule, step=step, betas=BETAS, eps=EPS, norms=norms,
            unit=unit, rounded=rounded, bias=bias, bias_gradient=d_bias,
        )  # fmt: skip
        torch.testing.assert_close(norms, gradient.square().sum(1))
        torch.testing.assert_close(d_bias, sums)
        gradient = reference.remove_parallel(gradient, twin.value) if unit else gradient
        reference.adam_(twin.value, gradient, *twin[1:], step=step, lr=1e-2 / step, betas=BETAS, eps=EPS)
        reference.adam_(twin_bias.value, sums, *twin_bias[1:], step=step, lr=1e-2 / step, betas=BETAS, eps=EPS)
        if unit:
            twin.value.copy_(reference.unit_norm(twin.value))
    for ours, theirs in zip([*parameter, *bias], [*twin, *twin_bias], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded, parameter.value.bfloat16())
