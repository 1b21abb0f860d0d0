"""TopK(relu(x W_enc + b_enc)) in one product and without [batch, n_latents]: the selection is the product's epilogue.

The latents are multiplied in a few growing stretches. After each, the k-th largest value that a row has seen is a
lower bound of its final k-th largest, so the next stretch writes only what exceeds it: about k * (growth - 1) keys a
row and stretch, into a buffer that holds them with eight standard deviations to spare. kernels/README.md derives it.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton_rescan import rescan_
from sae_kernels.triton_select import COUNT_STRIDE, Buffers, ordered, tighten_
from sae_kernels.triton_tiles import GROUP_ROWS, Tile, power_of_two, tile_for

ROWS_AT_ONCE = 16384  # bounds the buffers; W_enc is read again for every so many rows: 16k operations a byte


@triton.jit
def _emit(product, row, first, stop, order_ptr, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr, count_ptr,
          batch, CAPACITY: tl.constexpr, HAS_THETA: tl.constexpr, ROWS: tl.constexpr,
          LATENTS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Write the keys of z = product + b_enc [ROWS, LATENTS] that exceed their row's bound to the row's buffer.

    In PARTS steps, one half of the columns after the other, so that fewer registers live at once.
    """
    if PARTS == 1:
        place = first + tl.arange(0, LATENTS)
        latent = tl.load(order_ptr + place, mask=place < stop, other=0)
        z = product + tl.load(b_ptr + latent)[None, :]
        value = tl.load(least_ptr + row, mask=row < batch, other=float("inf"))[:, None]
        before = tl.load(before_ptr + row, mask=row < batch, other=0)[:, None]
        keep = ((z > value) | ((z == value) & (latent[None, :] < before))) & (place < stop)[None, :]
        if HAS_THETA:
            keep = keep & (z > tl.load(theta_ptr + latent)[None, :])
        counter = (count_ptr + row * COUNT_STRIDE)[:, None] + tl.zeros_like(latent)[None, :]
        slot = tl.atomic_add(counter, 1, mask=keep, sem="relaxed")
        key = (z.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)[None, :]
        tl.store((keys_ptr + row.to(tl.int64) * CAPACITY)[:, None] + slot, key, mask=keep & (slot < CAPACITY))
    else:
        HALF: tl.constexpr = LATENTS // 2
        left, right = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, HALF)), (0, 2, 1)))
        _emit(left, row, first, stop, order_ptr, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr, count_ptr,
              batch, CAPACITY, HAS_THETA, ROWS, HALF, PARTS // 2)  # fmt: skip
        _emit(right, row, first + HALF, stop, order_ptr, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr,
              count_ptr, batch, CAPACITY, HAS_THETA, ROWS, HALF, PARTS // 2)  # fmt: skip


@triton.jit
def _encode_kernel(x_ptr, W_ptr, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr, count_ptr,
                   order_ptr, batch, d_model, x_stride, W_stride, start, stop,
                   CAPACITY: tl.constexpr, HAS_THETA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
                   ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
                   GROUP: tl.constexpr):  # fmt: skip
    """One tile of z = x W_enc + b_enc for the latents order[start:stop]."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(batch, ROWS)
    sweep = GROUP * tl.cdiv(stop - start, LATENTS)
    first = (program // sweep) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    row = (first + (program % sweep) % height) * ROWS + tl.arange(0, ROWS)
    column = start + ((program % sweep) // height) * LATENTS
    place = column + tl.arange(0, LATENTS)
    latent = tl.load(order_ptr + place, mask=place < stop, other=0).to(tl.int64)  # past `stop`: not kept
    dim = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + tl.where(row < batch, row, 0).to(tl.int64)[:, None] * x_stride + dim[None, :]
    W_ptrs = W_ptr + latent[None, :] * W_stride + dim[:, None]
    product = tl.zeros((ROWS, LATENTS), dtype=tl.float32)
    for done in range(0, d_model, DEPTH):
        if EVEN:
            x, W = tl.load(x_ptrs), tl.load(W_ptrs)
        else:
            x = tl.load(x_ptrs, mask=dim[None, :] < d_model - done, other=0.0)
            W = tl.load(W_ptrs, mask=dim[:, None] < d_model - done, other=0.0)
        product = tl.dot(x, W, product, input_precision=PRECISION)
        x_ptrs += DEPTH
        W_ptrs += DEPTH
    _emit(product, row, column, stop, order_ptr, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr, count_ptr,
          batch, CAPACITY, HAS_THETA, ROWS, LATENTS, PARTS)  # fmt: skip


def capacity_for(k: int) -> int:
    """Places in a row's buffer: sixteen times what is kept, a power of two."""
    return max(256, power_of_two(16 * k)) if k <= 512 else power_of_two(4 * k)


def stretches(n_latents: int, *, k: int, capacity: int, block: int) -> list[tuple[int, int]]:
    """Growing [start, stop) that cover n_latents; the first fits the buffer whole, the others by their bound.

    With g = stop / start, the number of later latents above the k-th best of the first `start` is negative binomial:
    mean k (g - 1), variance k g (g - 1). g is the largest, at most 8, for which k kept + mean + 8 deviations fit.
    """
    growth = 8.0
    while growth > 1.25 and k * growth + 8 * math.sqrt(k * growth * (growth - 1)) > capacity:
        growth -= 0.25
    ends = [min(n_latents, max(capacity // block, 1) * block)]
    while ends[-1] < n_latents:
        ends.append(min(n_latents, max(int(ends[-1] * growth) // block, ends[-1] // block + 1) * block))
    return list(zip([0, *ends[:-1]], ends, strict=True))


@lru_cache(maxsize=8)
def scattered(n_latents: int, device: torch.device) -> Tensor:
    """All latents, int32, in steps near the golden section: any stretch of them samples all regions evenly.

    Neighbouring latents are often alike (nested dictionaries put the frequent ones first); a stretch of neighbours
    would bound the rest badly, a scattered one is as good as a random sample.
    """
    stride = max(1, round(n_latents * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, n_latents) != 1:
        stride += 1
    order = torch.arange(n_latents, device=device) * stride % n_latents
    return order.to(torch.int32)


def encode_stretch_(
    x: Tensor, W: Tensor, b_enc: Tensor, buffers: Buffers, *, start: int, stop: int, theta: Tensor | None, tile: Tile
) -> None:
    """Multiply x [rows, d_model] by the latents of one stretch of W [n_latents, d_model]; candidates to the buffers."""
    (rows, d_model), n_latents = x.shape, W.shape[0]
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(stop - start, tile.latents)
    _encode_kernel[(blocks,)](
        x, W, b_enc, theta if theta is not None else b_enc, buffers.bound_value, buffers.bound_latent, buffers.keys,
        buffers.count, scattered(n_latents, x.device), rows, d_model, x.stride(0), W.stride(0), start, stop,
        CAPACITY=buffers.keys.shape[1], HAS_THETA=theta is not None, EVEN=d_model % tile.depth == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", ROWS=tile.rows, LATENTS=tile.latents,
        DEPTH=tile.depth, PARTS=tile.parts, GROUP=GROUP_ROWS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def encode_select(
    x: Tensor, W: Tensor, b_enc: Tensor, *, k: int, theta: Tensor | None = None,
    capacity: int | None = None, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(values, indices) [batch, k] of the k largest positive x W^T + b_enc above theta, and the rows that overflowed.

    x [batch, d_model] and W [n_latents, d_model] share a dtype and have contiguous rows; sums are fp32. Reads
    2 d_model (batch + n_latents) bytes (bf16), writes 12 k batch and moves about 16 k log2(n_latents / capacity) batch.
    """
    batch, n_latents = x.shape[0], W.shape[0]
    capacity = capacity or capacity_for(k)
    tile = tile or tile_for(x)
    values = torch.empty(batch, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    overflowed = torch.zeros(batch, dtype=torch.int32, device=x.device)
    buffers = Buffers(min(batch, ROWS_AT_ONCE), capacity, x.device)
    for first in range(0, batch, ROWS_AT_ONCE):
        part = x[first : first + ROWS_AT_ONCE]
        rows = part.shape[0]
        buffers.reset()
        for start, stop in stretches(n_latents, k=k, capacity=capacity, block=tile.latents):
            encode_stretch_(part, W, b_enc, buffers, start=start, stop=stop, theta=theta, tile=tile)
            tighten_(buffers, rows, k=k)
        rescan_(part, W, b_enc, buffers.keys[:rows], buffers.count, buffers.overflow, k=k, theta=theta)
        ordered(buffers.keys[:rows], buffers.count[:rows], values[first : first + rows], indices[first : first + rows])
        overflowed[first : first + rows] = buffers.overflow[:rows]
    return values, indices, overflowed
