"""The two gathers of a sparse dictionary: rows of W_dec weighted and summed, and rows of W_dec dotted with an error.

Both read k rows a token, 2 k d_model bytes of bf16, and hold one fp32 vector; neither writes anything per latent.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton_tiles import power_of_two


@triton.jit
def _decode_kernel(values_ptr, indices_ptr, W_ptr, b_ptr, minus_ptr, out_ptr, k, d_model, W_stride, minus_stride,
                   PLACES: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr,
                   RESIDUAL: tl.constexpr):  # fmt: skip
    """DEPTH dimensions of one row of x_hat = sum_j values_j W[indices_j] + b, or of x - x_hat."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    total = tl.zeros((PLACES, DEPTH), dtype=tl.float32)
    for first in range(0, k, PLACES):
        place = first + tl.arange(0, PLACES)
        value = tl.load(values_ptr + row * k + place, mask=place < k, other=0.0).to(tl.float32)
        index = tl.load(indices_ptr + row * k + place, mask=place < k, other=-1)
        address = W_ptr + index.to(tl.int64)[:, None] * W_stride + dim[None, :]
        W = tl.load(address, mask=(index >= 0)[:, None] & (dim < d_model)[None, :], other=0.0)
        total += value[:, None] * W.to(tl.float32)
    x_hat = tl.sum(total, 0)
    if HAS_BIAS:
        x_hat += tl.load(b_ptr + dim, mask=dim < d_model, other=0.0).to(tl.float32)
    if RESIDUAL:
        x = tl.load(minus_ptr + row * minus_stride + dim, mask=dim < d_model, other=0.0).to(tl.float32)
        x_hat = x - x_hat
    tl.store(out_ptr + row * d_model + dim, x_hat, mask=dim < d_model)


@triton.jit
def _gather_dot_kernel(e_ptr, W_ptr, indices_ptr, source_ptr, out_ptr, scale, k, d_model, e_stride, W_stride,
                       PLACES: tl.constexpr, DEPTH: tl.constexpr, SOURCE: tl.constexpr):  # fmt: skip
    """PLACES of one row's scale * e . W[indices], 0 at empty ones; with SOURCE, each place says which row of e."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    index = tl.load(indices_ptr + row * k + place, mask=place < k, other=-1).to(tl.int64)
    read = index >= 0
    total = tl.zeros((PLACES, DEPTH), dtype=tl.float32)
    for first in range(0, d_model, DEPTH):
        dim = first + tl.arange(0, DEPTH)
        mask = read[:, None] & (dim < d_model)[None, :]
        W = tl.load(W_ptr + index[:, None] * W_stride + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        if SOURCE:
            source = tl.load(source_ptr + row * k + place, mask=read, other=0).to(tl.int64)
            total += W * tl.load(e_ptr + source[:, None] * e_stride + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            e = tl.load(e_ptr + row * e_stride + dim, mask=dim < d_model, other=0.0).to(tl.float32)
            total += W * e[None, :]
    tl.store(out_ptr + row * k + place, scale * tl.sum(total, 1), mask=place < k)


def blocks_for(d_model: int) -> tuple[int, int]:
    """(gathered rows in flight, dimensions) of a program of four warps: 32 numbers a thread, 16-byte loads."""
    depth = min(512, max(64, power_of_two(d_model)))
    return 4096 // depth, depth


def decode(
    values: Tensor, indices: Tensor, W: Tensor, bias: Tensor | None, *, residual_of: Tensor | None = None
) -> Tensor:
    """x_hat = sum_j values_j W[indices_j] (+ bias), or residual_of - x_hat; [batch, d_model] fp32.

    Rows of W [n_latents, d_model] and of residual_of [batch, d_model] are contiguous. Empty places are not read.
    """
    (batch, k), d_model = values.shape, W.shape[1]
    places, depth = blocks_for(d_model)
    out = torch.empty(batch, d_model, dtype=torch.float32, device=W.device)
    minus = out if residual_of is None else residual_of
    _decode_kernel[(batch, triton.cdiv(d_model, depth))](
        values.contiguous(), indices.contiguous(), W, W if bias is None else bias, minus, out, k, d_model, W.stride(0),
        minus.stride(0), PLACES=places, DEPTH=depth, HAS_BIAS=bias is not None, RESIDUAL=residual_of is not None,
        num_warps=4,
    )  # fmt: skip
    return out


def gather_dot(e: Tensor, W: Tensor, indices: Tensor, *, scale: float = 1.0, source: Tensor | None = None) -> Tensor:
    """scale * e . W[indices] [batch, k] in fp32; e [rows, d_model] and W [n_latents, d_model] with contiguous rows.

    At empty places the result is 0 and nothing is read. `source` [batch, k] says which row of e a place takes, None:
    that of its own number.
    """
    (batch, k), d_model = indices.shape, W.shape[1]
    places, depth = blocks_for(d_model)
    out = torch.empty(batch, k, dtype=torch.float32, device=W.device)
    _gather_dot_kernel[(batch, triton.cdiv(k, places))](
        e, W, indices.contiguous(), indices if source is None else source.int().contiguous(), out, scale, k, d_model,
        e.stride(0), W.stride(0), PLACES=places, DEPTH=depth, SOURCE=source is not None, num_warps=4,
    )  # fmt: skip
    return out
