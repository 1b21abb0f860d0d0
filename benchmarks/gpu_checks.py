"""The comparisons of tests/sae_kernels on a GPU, at sizes beyond the interpreter. Needs torch and Triton only."""

from collections.abc import Callable, Iterator

import torch
from sae_kernels import reference, triton_active, triton_ops
from sae_kernels.shard import Shard
from sae_kernels.triton_sparse_decode import decode, gather_dot
from sae_kernels.triton_sparse_gradient import row_gradient, segments
from sae_kernels.triton_tiles import tile_for
from sae_kernels.triton_topk_encode import encode_select, spread_of
from torch import Tensor

Check = tuple[str, Callable[[], None]]


def checks(device: torch.device, *, tiny: bool) -> Iterator[Check]:
    """Named functions that raise AssertionError; `tiny` keeps to what the interpreter can do in seconds."""
    shapes = [(5, 64, 19, 4), (1, 8, 4, 1), (3, 64, 16, 64)]
    dtypes = [torch.float32]
    if not tiny:
        shapes += [(300, 65536, 768, 32), (129, 20011, 200, 64), (64, 8192, 4096, 128), (33, 4096, 64, 1000)]
        dtypes += [torch.bfloat16]
    for shape in shapes:
        for dtype in dtypes:
            yield f"selection {shape} {dtype}", lambda shape=shape, dtype=dtype: _selection(device, *shape, dtype)
        yield f"gathers and gradients {shape}", lambda shape=shape: _gradients(device, *shape)
    yield "ties", lambda: _ties(device, 150 if tiny else 30000)
    yield "overflow", lambda: _overflow(device, 150 if tiny else 5000)
    yield "threshold", lambda: _active(device)
    if not tiny:
        for dead in (0, 500):
            yield f"step, {dead} dead", lambda dead=dead: _step(device, dead)
        yield "torch.compile", lambda: _compiled(device)


def integers(shape: tuple[int, ...], device: torch.device, *, low: int = -3, high: int = 4, seed: int = 0) -> Tensor:
    """Small integers, whose products and sums are exact in fp32 in any order."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float().to(device)


def _same(selected: tuple[Tensor, Tensor, Tensor], z: Tensor, k: int) -> None:
    expected = reference.topk(z, k)
    assert torch.equal(selected[0], expected.values), "values differ"
    active = expected.values > 0
    assert torch.equal(selected[1][active], expected.indices[active]), "indices differ"


def _selection(device: torch.device, batch: int, n_latents: int, d_model: int, k: int, dtype: torch.dtype) -> None:
    x, W = integers((batch, d_model), device), integers((n_latents, d_model), device, seed=1)
    b = integers((n_latents,), device, seed=2)
    selected = encode_select(x.to(dtype), W.to(dtype), b, k=k)
    _same(selected, (x.double() @ W.double().T).float() + b, k)
    assert not selected[2].any(), "a buffer overflowed on random data"
    again = encode_select(x.to(dtype), W.to(dtype), b, k=k)
    assert all(torch.equal(one, two) for one, two in zip(selected, again, strict=True)), "two runs differ"


def _ties(device: torch.device, n_latents: int) -> None:
    x, W = integers((40, 4), device, low=0, high=2), integers((n_latents, 4), device, low=0, high=2, seed=1)
    selected = encode_select(x.float(), W, torch.zeros(n_latents, device=device), k=37)
    _same(selected, x @ W.T, 37)


def _overflow(device: torch.device, n_latents: int) -> None:
    x, W = torch.ones(3, 16, device=device), torch.zeros(n_latents, 16, device=device)
    leads = -(-n_latents // tile_for(x).latents)
    first = torch.arange(leads, device=device) * spread_of(leads) % leads
    order = first[:, None] + leads * torch.arange(n_latents, device=device)
    b = torch.empty(n_latents, device=device)
    b[order[order < n_latents]] = torch.arange(n_latents, device=device).float()
    selected = encode_select(x, W, b, k=3, capacity=32)
    assert selected[2].all()
    _same(selected, b.expand(3, -1), 3)


def _gradients(device: torch.device, batch: int, n_latents: int, d_model: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(batch, min(n_latents, 1000), generator=generator).argsort(1)[:, :k].contiguous().to(device)
    values = torch.rand(batch, k, generator=generator).to(device)
    x, W = (torch.randn(rows, d_model, generator=generator).to(device) for rows in (batch, n_latents))
    expected = torch.nn.functional.embedding_bag(
        indices, W.double(), per_sample_weights=values.double(), mode="sum"
    )  # fmt: skip
    torch.testing.assert_close(decode(values, indices, W, None).double(), expected, rtol=1e-4, atol=1e-4)
    dots = torch.stack([(x.double() * W.double()[column]).sum(1) for column in indices.unbind(1)], 1)
    torch.testing.assert_close(gather_dot(x, W, indices).double(), dots, rtol=1e-4, atol=1e-4)
    gradient = torch.zeros(n_latents, d_model, dtype=torch.float64, device=device)
    for weight, column in zip(values.double().unbind(1), indices.unbind(1), strict=True):
        gradient.index_add_(0, column, weight[:, None] * x.double())
    by_latent = segments(indices, n_latents=n_latents)
    ours, _ = row_gradient(x, values, by_latent, n_latents=n_latents)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, row_gradient(x, values, by_latent, n_latents=n_latents)[0]), "two runs differ"


def _active(device: torch.device) -> None:
    x, W, b_enc = integers((20, 8), device), integers((200, 8), device, seed=1), integers((200,), device, seed=2)
    theta, zero = torch.arange(200, device=device).remainder(9).float(), torch.zeros(8, device=device)
    z = reference.pre_activations(x, W.T, b_enc, zero)
    ours = triton_active.threshold_encode(x, W.T, b_enc, zero, theta=theta, width=4)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, reference.threshold(z, theta), strict=True))


def dictionary(n_latents: int, d_model: int, device: torch.device, *, k: int, backend: str, dead: int = 0) -> Shard:
    """A dictionary with random unit rows, the encoder its transpose."""
    generator = torch.Generator(device).manual_seed(0)
    W_dec = reference.unit_norm(torch.randn(n_latents, d_model, generator=generator, device=device))
    sae = Shard(
        W_dec.t(), W_dec, b_enc=torch.zeros(n_latents, device=device), b_dec=torch.zeros(d_model, device=device), k=k,
        k_aux=64 if dead else 0, aux_coefficient=1 / 32, dead_after_tokens=1 << 40, backend=backend,
    )  # fmt: skip
    sae.tokens_since_fired[:dead] = 1 << 40
    return sae


def _step(device: torch.device, dead: int) -> None:
    ours, plain = (dictionary(2000, 256, device, k=16, backend=backend, dead=dead) for backend in ("triton", "torch"))
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)).to(device)
    gradients, statistics = ours.gradients(x, variance=256.0)
    expected, expected_statistics = plain.gradients(x, variance=256.0)
    for name, mine, theirs in zip(gradients._fields, gradients, expected, strict=True):
        # a latent chosen on one side only, on a near-tie that two orders of summation decide, moves one row
        error = float((mine - theirs).norm() / theirs.norm())
        assert error < 1e-3, f"{name}: relative error {error}"
    for mine, theirs in zip(statistics[:3], expected_statistics[:3], strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-4, atol=0)
    for sae in (ours, plain):
        for _ in range(3):
            sae.step(x, lr=1e-3, variance=256.0)
    error = float((ours.W_dec - plain.W_dec).norm() / plain.W_dec.norm())
    assert error < 1e-3, f"W_dec after three steps: relative error {error}"


def _compiled(device: torch.device) -> None:
    W, x, zero = torch.randn(512, 64, device=device), torch.randn(32, 64, device=device), torch.zeros(64, device=device)
    b_enc = torch.zeros(512, device=device)

    def rebuild(x: Tensor, W: Tensor) -> Tensor:
        return triton_ops.sparse_decode(*triton_ops.topk_encode(x, W.T, b_enc, zero, k=8), W, zero).square().sum()

    results = []
    for function in (rebuild, torch.compile(rebuild, fullgraph=True)):
        given = [x.clone().requires_grad_(), W.clone().requires_grad_()]
        results.append(torch.autograd.grad(function(*given), given))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
