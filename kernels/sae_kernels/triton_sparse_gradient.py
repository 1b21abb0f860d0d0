"""Gradients of W_enc, W_dec and b_enc from the active latents alone, each row written once and always in one order.

The (token, latent) pairs are sorted by latent (stable, so tokens stay in order): a latent's pairs are then one segment,
and one program sums the segment for DEPTH dimensions in registers. Same bits on every run; no atomics.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton_tiles import power_of_two


class Segments(NamedTuple):
    """The pairs of a batch by latent: latent i owns offsets[i]:offsets[i + 1] of `pairs`, numbers in [0, batch * k)."""

    pairs: Tensor  # int32 [batch * k]; empty places come last and belong to no latent
    offsets: Tensor  # int32 [n_latents + 1]


def segments(indices: Tensor, *, n_latents: int) -> Segments:
    """Sort the pairs by latent, without asking the device how many there are."""
    latent = torch.where(indices >= 0, indices, n_latents).flatten().to(torch.int32)
    ordered, pairs = torch.sort(latent, stable=True)
    starts = torch.arange(n_latents + 1, device=indices.device, dtype=torch.int32)
    return Segments(pairs.to(torch.int32), torch.searchsorted(ordered, starts, out_int32=True))


@triton.jit
def segment_sum(rows_ptr, weights_ptr, pairs_ptr, source_ptr, begin, end, k, stride, dim, d_model,
                SOURCE: tl.constexpr, PAIRS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """sum over the segment's pairs of weights[pair] * rows[source[pair]], or rows[pair // k], over `dim`."""
    total = tl.zeros((PAIRS, DEPTH), dtype=tl.float32)
    for first in range(begin, end, PAIRS):
        at = first + tl.arange(0, PAIRS)
        pair = tl.load(pairs_ptr + at, mask=at < end, other=0)
        weight = tl.load(weights_ptr + pair, mask=at < end, other=0.0)
        token = tl.load(source_ptr + pair, mask=at < end, other=0) if SOURCE else pair // k
        address = rows_ptr + token.to(tl.int64)[:, None] * stride + dim[None, :]
        row = tl.load(address, mask=(at < end)[:, None] & (dim < d_model)[None, :], other=0.0)
        total += weight[:, None] * row.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def weight_sum(weights_ptr, pairs_ptr, begin, end):
    """sum over the segment's pairs of weights[pair]."""
    total = tl.zeros((64,), dtype=tl.float32)
    for first in range(begin, end, 64):
        at = first + tl.arange(0, 64)
        pair = tl.load(pairs_ptr + at, mask=at < end, other=0)
        total += tl.load(weights_ptr + pair, mask=at < end, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _gradient_kernel(rows_ptr, weights_ptr, pairs_ptr, offsets_ptr, source_ptr, out_ptr, sum_ptr, k, d_model, stride,
                     SOURCE: tl.constexpr, PAIRS: tl.constexpr, DEPTH: tl.constexpr,
                     HAS_SUM: tl.constexpr):  # fmt: skip
    """DEPTH dimensions of one latent's row of the gradient."""
    latent = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    begin, end = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
    total = segment_sum(rows_ptr, weights_ptr, pairs_ptr, source_ptr, begin, end, k, stride, dim, d_model,
                        SOURCE, PAIRS, DEPTH)  # fmt: skip
    tl.store(out_ptr + latent * d_model + dim, total, mask=dim < d_model)
    if HAS_SUM:
        tl.store(sum_ptr + latent, weight_sum(weights_ptr, pairs_ptr, begin, end), mask=tl.program_id(1) == 0)


def blocks_for(d_model: int) -> tuple[int, int]:
    """(pairs in flight, dimensions) of a program of four warps: 16 numbers a thread."""
    depth = min(512, max(64, power_of_two(d_model)))
    return 2048 // depth, depth


def row_gradient(
    rows: Tensor,
    weights: Tensor,
    by_latent: Segments,
    *,
    n_latents: int,
    with_sum: bool = False,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """G[i] = sum over pairs (b, j) of latent i of weights[b, j] rows[b], [n_latents, d_model] fp32, deterministic.

    Reads the rows once a pair (2 k batch d_model bytes of bf16, mostly from the cache) and writes 4 n_latents d_model.
    `with_sum` adds sum of weights by latent, which is the gradient of b_enc. `source` [batch, k] says which row a pair
    takes, None: that of its own number.
    """
    d_model, k = rows.shape[1], weights.shape[1]
    pairs, depth = blocks_for(d_model)
    out = torch.empty(n_latents, d_model, dtype=torch.float32, device=rows.device)
    total = torch.empty(n_latents, dtype=torch.float32, device=rows.device) if with_sum else None
    _gradient_kernel[(n_latents, triton.cdiv(d_model, depth))](
        rows, weights, by_latent.pairs, by_latent.offsets, by_latent.pairs if source is None else source, out,
        out if total is None else total, k, d_model, rows.stride(0), SOURCE=source is not None,
        PAIRS=pairs, DEPTH=depth, HAS_SUM=with_sum, num_warps=4,
    )  # fmt: skip
    return out, total
