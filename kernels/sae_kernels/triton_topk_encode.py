"""TopK(relu(x W_enc + b_enc)) in one product and without [batch, n_latents]: the selection is the product's epilogue.

The latents are multiplied in a few growing stretches. After each, the k-th largest value that a row has seen is a
lower bound of its final k-th largest, so the next stretch writes only what exceeds it: about k * (growth - 1) keys a
row and stretch, into a buffer that holds them with eight standard deviations to spare. kernels/README.md derives it.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_kernels.triton_rescan import rescan_
from sae_kernels.triton_select import COUNT_STRIDE, Buffers, ordered, tighten_
from sae_kernels.triton_tiles import GROUP_ROWS, LANES, Tile, power_of_two, processors, tile_for

ROWS_AT_ONCE = 16384  # bounds the buffers; W_enc is read again for every so many rows: 16k operations a byte


@triton.jit
def _append(z, keys_ptr, place, end, low, step, FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
            LANES: tl.constexpr):  # fmt: skip
    """Write the keys of the positive z [ROWS, WIDTH] from `place` [ROWS, LANES] on; returns the place after them.

    One element of each lane at a time, so that a place is a running sum in a register. z is columns FIRST to FIRST +
    WIDTH of the tile; `low` [LANES] is the lower half of a lane's first key, and `step` what a column takes off it.
    """
    if WIDTH == LANES:
        keep = z > 0
        # unsigned, or the sign of the lower half would cost a shift and an or in every element
        lower = (low - FIRST * step).to(tl.uint32).to(tl.int64)[None, :]
        key = (z.to(tl.int32, bitcast=True).to(tl.int64) << 32) | lower
        tl.store(keys_ptr + place, key, mask=keep & (place < end))
        place = tl.where(keep, place + 1, place)
    elif WIDTH == 2 * LANES:  # a lane has two neighbouring columns of every 2 LANES
        even, odd = tl.split(tl.reshape(z, (ROWS, LANES, 2)))
        place = _append(even, keys_ptr, place, end, low, step, FIRST, ROWS, LANES, LANES)
        place = _append(odd, keys_ptr, place, end, low, step, FIRST + 1, ROWS, LANES, LANES)
    else:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, HALF)), (0, 2, 1)))
        place = _append(left, keys_ptr, place, end, low, step, FIRST, ROWS, HALF, LANES)
        place = _append(right, keys_ptr, place, end, low, step, FIRST + HALF, ROWS, HALF, LANES)
    return place


@triton.jit
def _emit(product, first_row, lead, leads, n_latents, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr, count_ptr,
          batch, CAPACITY: tl.constexpr, HAS_THETA: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr,
          FRAGMENTS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Append the keys of z = product + b_enc [ROWS, LATENTS] that exceed their row's bound to the row's buffer.

    A lane (one of the LANES threads that hold a row in a matrix unit's result) counts what it keeps, takes its places
    with one atomic, and writes. Rows are renamed first, so that the result lies in registers as the compiler wants
    memory to be addressed: without that every key would go through shared memory.
    """
    at = tl.arange(0, ROWS)
    fragment = at // (16 * FRAGMENTS) * (16 * FRAGMENTS)
    row = first_row + fragment + at // 8 % FRAGMENTS * 16 + at // (8 * FRAGMENTS) % 2 * 8 + at % 8
    product = tl.reshape(product, (ROWS // (16 * FRAGMENTS), FRAGMENTS, 2, 8, LATENTS))
    product = tl.reshape(tl.permute(product, (0, 2, 1, 3, 4)), (ROWS, LATENTS))
    latent = tl.arange(0, LATENTS) * leads + lead
    z = product + tl.load(b_ptr + latent, mask=latent < n_latents, other=-float("inf"))[None, :]
    if HAS_THETA:
        theta = tl.load(theta_ptr + latent, mask=latent < n_latents, other=0.0)
        z = tl.where(z > theta[None, :], z, -float("inf"))
    value = tl.load(least_ptr + row, mask=row < batch, other=float("inf"))[:, None]
    before = tl.load(before_ptr + row, mask=row < batch, other=0)[:, None]
    keep = (z > value) | ((z == value) & (latent[None, :] < before))
    z = tl.where(keep, z, 0.0)
    kept = tl.reshape(keep.to(tl.int32), (ROWS, LATENTS // (2 * LANES), LANES, 2))
    count = tl.sum(tl.sum(kept, 3), 1)
    counter = count_ptr + row[:, None] * COUNT_STRIDE + tl.zeros_like(count)
    taken = tl.atomic_add(counter, count, mask=count > 0, sem="relaxed")
    begin = row[:, None] * CAPACITY
    low = 0x7FFFFFFF - lead - 2 * leads * tl.arange(0, LANES)
    _append(z, keys_ptr, begin + taken, begin + CAPACITY, low, leads, 0, ROWS, LATENTS, LANES)


@triton.jit(do_not_specialize=["start", "stop", "leads", "spread", "batch"])  # one binary for all stretches
def _encode_kernel(x_ptr, W_ptr, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr, count_ptr,
                   batch, d_model, n_latents, leads, spread, x_stride, W_stride, start, stop,
                   CAPACITY: tl.constexpr, HAS_THETA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
                   BULK: tl.constexpr, RESIDENT: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr,
                   DEPTH: tl.constexpr, FRAGMENTS: tl.constexpr, LANES: tl.constexpr,
                   GROUP: tl.constexpr):  # fmt: skip
    """Tiles of z = x W_enc + b_enc; column tile t has the latents t spread % leads + j leads, j < LATENTS.

    BULK: x_ptr is a descriptor of x, W_ptr one of W seen as [LATENTS, leads d_model], which the copy engine reads.
    RESIDENT: the program goes on to further tiles, and their first operands arrive during the epilogue.
    """
    row_blocks = tl.cdiv(batch, ROWS)
    sweep = GROUP * (stop - start)
    for tile in tl.range(tl.program_id(0), row_blocks * (stop - start), tl.num_programs(0), flatten=RESIDENT):
        first = (tile // sweep) * GROUP
        height = tl.minimum(row_blocks - first, GROUP)
        first_row = (first + (tile % sweep) % height) * ROWS
        lead = (start + (tile % sweep) // height) * spread % leads
        product = tl.zeros((ROWS, LATENTS), dtype=tl.float32)
        if BULK:
            for done in range(0, d_model, DEPTH):
                x = x_ptr.load([first_row, done])
                W = W_ptr.load([0, lead * d_model + done])
                product = tl.dot(x, W.T, product, input_precision=PRECISION)
        else:
            dim = tl.arange(0, DEPTH)
            row = first_row + tl.arange(0, ROWS)
            latent = tl.arange(0, LATENTS) * leads + lead
            latent = tl.where(latent < n_latents, latent, 0).to(tl.int64)  # past the end: not kept
            x_ptrs = x_ptr + tl.where(row < batch, row, 0).to(tl.int64)[:, None] * x_stride + dim[None, :]
            W_ptrs = W_ptr + latent[None, :] * W_stride + dim[:, None]
            for done in range(0, d_model, DEPTH):
                if EVEN:
                    x, W = tl.load(x_ptrs), tl.load(W_ptrs)
                else:
                    x = tl.load(x_ptrs, mask=dim[None, :] < d_model - done, other=0.0)
                    W = tl.load(W_ptrs, mask=dim[:, None] < d_model - done, other=0.0)
                product = tl.dot(x, W, product, input_precision=PRECISION)
                x_ptrs += DEPTH
                W_ptrs += DEPTH
        _emit(product, first_row, lead, leads, n_latents, b_ptr, theta_ptr, least_ptr, before_ptr, keys_ptr, count_ptr,
              batch, CAPACITY, HAS_THETA, ROWS, LATENTS, FRAGMENTS, LANES)  # fmt: skip


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


def spread_of(leads: int) -> int:
    """The step in which column tiles take their leads, near the golden section: any stretch of them samples evenly.

    Neighbouring latents are often alike (nested dictionaries put the frequent ones first). A column tile takes every
    `leads`-th latent from its lead on, and stretches take leads in these steps: both are as good as random samples.
    """
    spread = max(1, min(round(leads * (math.sqrt(5) - 1) / 2), 2**31 // leads - 1))  # products stay in 32 bits
    while math.gcd(spread, leads) != 1:
        spread -= 1
    return spread


def can_be_bulk(x: Tensor, W: Tensor, tile: Tile) -> bool:
    """Whether the copy engine can read the operands: whole tiles, rows that begin at multiples of 16 bytes."""
    (n_latents, d_model), aligned = W.shape, 16 // x.element_size()
    return (
        n_latents % tile.latents == 0
        and d_model % tile.depth == 0
        and (W.stride(0), x.stride(0) % aligned) == (d_model, 0)
        and x.data_ptr() % 16 == W.data_ptr() % 16 == 0
    )


class Operands(NamedTuple):
    """The operands of a product, the same for all of its stretches."""

    x: Tensor | TensorDescriptor
    W: Tensor | TensorDescriptor
    leads: int


def operands(x: Tensor, W: Tensor, tile: Tile) -> Operands:
    """x [rows, d_model] and W [n_latents, d_model] for `encode_stretch_`, if possible as descriptors."""
    leads = -(-len(W) // tile.latents)
    if not (tile.bulk and can_be_bulk(x, W, tile)):
        return Operands(x, W, leads)
    by_lead = W.view(tile.latents, leads * W.shape[1])
    described = (TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
                 TensorDescriptor.from_tensor(by_lead, [tile.latents, tile.depth]))  # fmt: skip
    return Operands(*described, leads)


def encode_stretch_(
    x: Tensor, W: Tensor, b_enc: Tensor, buffers: Buffers, *, given: Operands, start: int, stop: int,
    theta: Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    """Multiply x [rows, d_model] by column tiles start to stop of W [n_latents, d_model]; candidates to the buffers."""
    rows, d_model = x.shape
    tiles = triton.cdiv(rows, tile.rows) * (stop - start)
    bulk = given.x is not x
    resident = tile.resident * processors(x.device) if bulk else 0
    _encode_kernel[(min(tiles, resident) if resident else tiles,)](
        given.x, given.W, b_enc, theta if theta is not None else b_enc, buffers.bound_value, buffers.bound_latent,
        buffers.keys, buffers.count, rows, d_model, len(W), given.leads, spread_of(given.leads), x.stride(0),
        W.stride(0), start, stop, CAPACITY=buffers.keys.shape[1], HAS_THETA=theta is not None,
        EVEN=d_model % tile.depth == 0, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", BULK=bulk,
        RESIDENT=resident > 0, ROWS=tile.rows, LATENTS=tile.latents, DEPTH=tile.depth, FRAGMENTS=tile.fragments,
        LANES=LANES, GROUP=GROUP_ROWS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def encode_select(
    x: Tensor, W: Tensor, b_enc: Tensor, *, k: int, theta: Tensor | None = None,
    capacity: int | None = None, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(values, indices) [batch, k] of the k largest positive x W^T + b_enc above theta, and the rows that overflowed.

    x [batch, d_model] and W [n_latents, d_model] share a dtype and have contiguous rows; sums are fp32. Reads
    2 d_model (batch + n_latents) bytes (bf16), writes 12 k batch and moves about 16 k log2(n_latents / capacity) batch.
    """
    batch = x.shape[0]
    capacity = capacity or capacity_for(k)
    tile = tile or tile_for(x, theta=theta is not None)
    values = torch.empty(batch, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    overflowed = torch.empty(batch, dtype=torch.int32, device=x.device)
    buffers = Buffers(min(batch, ROWS_AT_ONCE), capacity, x.device)
    for first in range(0, batch, ROWS_AT_ONCE):
        part = x[first : first + ROWS_AT_ONCE]
        rows, given = part.shape[0], operands(part, W, tile)
        buffers.reset()
        for start, stop in stretches(given.leads * tile.latents, k=k, capacity=capacity, block=tile.latents):
            tiles = {"start": start // tile.latents, "stop": stop // tile.latents}
            encode_stretch_(part, W, b_enc, buffers, given=given, **tiles, theta=theta, tile=tile)
            tighten_(buffers, rows, k=k)
        rescan_(part, W, b_enc, buffers.keys[:rows], buffers.count, buffers.overflow, k=k, theta=theta)
        ordered(buffers.keys[:rows], buffers.count[:rows], values[first : first + rows], indices[first : first + rows])
        overflowed[first : first + rows] = buffers.overflow[:rows]
    return values, indices, overflowed
