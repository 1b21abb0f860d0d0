import math

import pytest
import torch
from sae_kernels import reference
from sae_kernels.triton_tiles import tile_for
from sae_kernels.triton_topk_encode import capacity_for, encode_select, spread_of, stretches

from tests.allocations import Allocations


def integers(shape, device, *, low=-3, high=4, seed=0):
    """Small integers: every product and sum is exact in fp32 in any order, so selections must agree bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).float().to(device)


def assert_same(selected, expected):
    values, indices, _ = selected
    assert torch.equal(values, expected.values)
    assert torch.equal(indices[values > 0], expected.indices[values > 0])


@pytest.mark.parametrize(
    "batch, n_latents, d_model, k, capacity",
    [
        (5, 64, 19, 4, None),  # d_model is no multiple of the block
        (1, 8, 4, 1, None),  # one row
        (3, 64, 16, 64, None),  # k = n_latents
        (17, 100, 40, 3, 32),  # four stretches; tails in rows, latents and dimensions
        (9, 130, 8, 129, None),  # more than is ranked in the kernel
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_selection_is_the_references_bit_for_bit(device, batch, n_latents, d_model, k, capacity, dtype):
    shapes = [(batch, d_model), (n_latents, d_model), (n_latents,)]
    x, W, b = (integers(shape, device, seed=seed) for seed, shape in enumerate(shapes))
    selected = encode_select(x.to(dtype), W.to(dtype), b, k=k, capacity=capacity)
    assert_same(selected, reference.topk(x @ W.T + b, k))


@pytest.mark.slow
@pytest.mark.parametrize("resident", [0, 1])  # 1: as on a GPU that has it
def test_operands_that_the_copy_engine_reads_give_the_same_selection(device, resident):
    tile = tile_for(torch.empty(1, 64, dtype=torch.bfloat16, device=device))._replace(bulk=True, resident=resident)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("this GPU has no such engine")
    n_latents = 5 * tile.latents
    x, W, b = (integers(s, device, seed=i) for i, s in enumerate([(37, 64), (n_latents, 64), (n_latents,)]))
    selected = encode_select(x.bfloat16(), W.bfloat16(), b, k=3, capacity=tile.latents, tile=tile)
    assert_same(selected, reference.topk(x @ W.T + b, 3))


def test_ties_go_to_the_lower_latent_in_every_stretch(device):
    x, W, b = (integers(s, device, low=0, high=2, seed=i) for i, s in enumerate([(6, 4), (100, 4), (100,)]))
    selected = encode_select(x.bfloat16(), W.bfloat16(), b, k=7, capacity=32)
    assert_same(selected, reference.topk(x @ W.T + b, 7))  # five values in all: nearly everything is a tie


def test_values_that_differ_in_the_last_bit_are_told_apart(device):
    x = torch.ones(2, 16, device=device)
    W = torch.zeros(96, 16, device=device)
    W[:, 0] = 1.0
    b = torch.arange(96, device=device).remainder(7) * 2.0**-23  # 1 + j ulp
    selected = encode_select(x.bfloat16(), W.bfloat16(), b, k=11, capacity=32)
    assert_same(selected, reference.topk(x @ W.T + b, 11))
    assert selected[0][0, 0] - selected[0][0, -1] <= 2.0**-23


def test_a_row_without_positive_values_and_a_nan_select_nothing(device):
    x, W = torch.ones(3, 8, device=device), -torch.ones(40, 8, device=device)
    x[1, 3] = math.nan
    values, indices, _ = encode_select(x.bfloat16(), W.bfloat16(), torch.zeros(40, device=device), k=3)
    assert not values.any() and bool((indices == reference.EMPTY).all())


def test_a_buffer_that_overflows_is_counted_and_still_exact(device):
    n_latents, k, capacity = 150, 3, 32
    leads = -(-n_latents // tile_for(torch.empty(2, 16, dtype=torch.bfloat16, device=device)).latents)
    order = (torch.arange(leads) * spread_of(leads) % leads)[:, None] + leads * torch.arange(n_latents)
    b = torch.zeros(n_latents)
    b[order[order < n_latents]] = torch.arange(n_latents).float()  # every stretch beats all before it
    x, W = torch.ones(2, 16), torch.zeros(n_latents, 16)
    selected = encode_select(x.to(device).bfloat16(), W.to(device).bfloat16(), b.to(device), k=k, capacity=capacity)
    assert selected[2].tolist() == [1, 1]
    assert_same(selected, reference.topk((x @ W.T + b).to(device), k))


def test_theta_lets_only_values_above_it_through(device):
    x, W, theta = (integers(s, device, seed=i) for i, s in enumerate([(4, 20), (50, 20), (50,)]))
    z, b = x @ W.T, torch.zeros(50, device=device)
    selected = encode_select(x.bfloat16(), W.bfloat16(), b, k=9, theta=theta)
    assert_same(selected, reference.topk(torch.where(z > theta, z, 0.0), 9))


@pytest.mark.parametrize("n_latents, k", [(7, 1), (16384, 32), (65536, 64), (1048576, 32), (1000003, 500)])
def test_stretches_cover_every_latent_once_and_fit_the_buffer(n_latents, k):
    capacity = capacity_for(k)
    spans = stretches(n_latents, k=k, capacity=capacity, block=128)
    assert spans[0][0] == 0 and spans[-1][1] == n_latents
    assert all(stop == start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))
    assert spans[0][1] <= capacity
    for start, stop in spans[1:]:
        growth = stop / start
        assert k * growth + 8 * math.sqrt(k * growth * (growth - 1)) <= capacity


@pytest.mark.parametrize("leads", [1, 2, 3, 64, 4096, 100_003, 1 << 20])
def test_column_tiles_take_every_lead_once_in_steps_that_32_bits_hold(leads):
    assert leads * spread_of(leads) < 2**31
    order = torch.arange(leads) * spread_of(leads) % leads
    assert torch.equal(order.sort().values, torch.arange(leads))


def test_the_buffers_grow_with_k_and_not_with_n_latents(device):
    sizes = [capacity_for(k) for k in (1, 32, 64, 512, 2048)]
    assert sizes == [256, 512, 1024, 8192, 8192]


@pytest.mark.slow
def test_nothing_as_large_as_the_pre_activations_is_ever_allocated(device):
    batch, n_latents, d_model, k = 32, 1500, 8, 3
    x, W = integers((batch, d_model), device), integers((n_latents, d_model), device, seed=1)
    with Allocations() as seen:
        selected = encode_select(x, W, torch.zeros(n_latents, device=device), k=k)
    assert max(seen.bytes) <= max(8 * batch * capacity_for(k), W.nbytes) < 2 * batch * n_latents  # bf16
    assert_same(selected, reference.topk(x @ W.T, k))
