"""Candidates of a row kept in a bounded buffer: the k largest by value, ties by the lower index.

A candidate is one int64 key, (bits of the fp32 value) << 32 | (2**31 - 1 - latent). Positive floats order as their
bits do, so comparing keys compares values first and prefers the lower latent on a tie; keys are unique, so every
selection by key is deterministic whatever the order of arrival. A zero key is an empty place.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.reference import EMPTY
from sae_kernels.triton_tiles import power_of_two

COUNT_STRIDE = tl.constexpr(8)  # 32 bytes a counter: side by side, the compiler would give the atomics another layout
RANKED_IN_KERNEL = 128  # k^2 comparisons a row; above it one segmented sort is cheaper


@triton.jit
def keep_largest(keys_ptr, count, k, CAPACITY: tl.constexpr):
    """Move the k largest of the row's first `count` keys to its front.

    Returns the k-th largest as (value bits, low bits), (0, 2**31 - 1) when there are fewer, and how many were kept.
    """
    place = tl.arange(0, CAPACITY)
    high = (tl.load(keys_ptr + place, mask=place < count, other=0) >> 32).to(tl.int32)
    bits = tl.sum(tl.zeros_like(high), 0)  # a scalar 0
    for step in range(31):  # binary search on the bits of the value: 31 counts, no sort
        guess = bits + (1 << (30 - step))
        bits = tl.where(tl.sum((high >= guess).to(tl.int32), 0) >= k, guess, bits)
    above = tl.sum((high > bits).to(tl.int32), 0)
    at = tl.sum((high == bits).to(tl.int32), 0)
    low = tl.where(bits > 0, 0, 0x7FFFFFFF)
    tl.debug_barrier()
    key = tl.load(keys_ptr + place, mask=place < count, other=0)  # again, from the cache: held, it costs registers
    if (bits > 0) & (above + at > k):  # a tie across the k-th place: the same search on the index
        tied = tl.where((key >> 32).to(tl.int32) == bits, key.to(tl.int32), -1)
        for step in range(31):
            guess = low + (1 << (30 - step))
            low = tl.where(tl.sum((tied >= guess).to(tl.int32), 0) >= k - above, guess, low)
    bound = (bits.to(tl.int64) << 32) | low.to(tl.int64)
    survives = (key >= bound) & (key > 0)
    target = tl.cumsum(survives.to(tl.int32), 0) - 1
    tl.debug_barrier()  # every key is read before any is overwritten
    tl.store(keys_ptr + target, key, mask=survives)
    tl.debug_barrier()
    return bits, low, tl.sum(survives.to(tl.int32), 0)


@triton.jit
def _tighten_kernel(keys_ptr, count_ptr, least_ptr, before_ptr, overflow_ptr, k, CAPACITY: tl.constexpr):
    """One row: keep its k best candidates and raise its bound to the k-th; note a row that lost candidates."""
    row = tl.program_id(0)
    count = tl.load(count_ptr + row * COUNT_STRIDE)
    if count > CAPACITY:
        tl.store(overflow_ptr + row, 1)
    bits, low, kept = keep_largest(keys_ptr + row.to(tl.int64) * CAPACITY, count, k, CAPACITY)
    tl.store(count_ptr + row * COUNT_STRIDE, kept)
    tl.store(least_ptr + row, bits.to(tl.float32, bitcast=True))
    tl.store(before_ptr + row, 0x7FFFFFFF - low)


@triton.jit
def _rank_kernel(keys_ptr, count_ptr, values_ptr, indices_ptr, k, CAPACITY: tl.constexpr, K: tl.constexpr):
    """One row: its kept keys in descending order. The place of a key is the number of larger ones."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    count = tl.load(count_ptr + row * COUNT_STRIDE)
    key = tl.load(keys_ptr + row * CAPACITY + place, mask=place < count, other=0)
    rank = tl.sum((key[None, :] > key[:, None]).to(tl.int32), 1)
    rank = tl.where(place < count, rank, place)
    value = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    latent = tl.where(place < count, 0x7FFFFFFF - key.to(tl.int32), -1)
    tl.store(values_ptr + row * k + rank, value, mask=place < k)
    tl.store(indices_ptr + row * k + rank, latent.to(tl.int64), mask=place < k)


def warps_for(capacity: int) -> int:
    """One warp to 512 keys: 16 keys a lane in registers, and up to 512 keys need no shared memory and no barrier."""
    return min(max(capacity // 512, 1), 16)


def rank_warps(size: int) -> int:
    """One warp up to 32 places: a lane has one of them."""
    return 1 if size <= 32 else 4


class Buffers:
    """What an encode keeps on the device between its kernels: [rows, capacity] keys and four numbers a row."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.keys = torch.empty(rows, capacity, dtype=torch.int64, device=device)
        self.count = torch.empty(rows, int(COUNT_STRIDE), dtype=torch.int32, device=device)
        self.overflow = torch.empty(rows, dtype=torch.int32, device=device)
        self.bound_value = torch.empty(rows, dtype=torch.float32, device=device)
        self.bound_latent = torch.empty(rows, dtype=torch.int32, device=device)

    def reset(self) -> None:
        for number in (self.count, self.overflow, self.bound_value, self.bound_latent):
            number.zero_()


def tighten_(buffers: Buffers, rows: int, *, k: int) -> None:
    """Keep the k largest keys of each of the first `rows` rows in front; bounds, counts and overflow follow."""
    capacity = buffers.keys.shape[1]
    _tighten_kernel[(rows,)](
        buffers.keys, buffers.count, buffers.bound_value, buffers.bound_latent, buffers.overflow, k,
        CAPACITY=capacity, num_warps=warps_for(capacity),
    )  # fmt: skip


def ordered(keys: Tensor, count: Tensor, values: Tensor, indices: Tensor) -> None:
    """Write the rows' kept keys, at most k of them, to values and indices [rows, k] in descending order."""
    (rows, capacity), k = keys.shape, values.shape[1]
    if k <= RANKED_IN_KERNEL:
        size = power_of_two(k)
        _rank_kernel[(rows,)](keys, count, values, indices, k, CAPACITY=capacity, K=size, num_warps=rank_warps(size))
        return
    kept = torch.arange(k, device=keys.device) < count[:, :1]
    key = torch.where(kept, keys[:, :k], 0).sort(dim=1, descending=True).values
    values.copy_((key >> 32).to(torch.int32).view(torch.float32))
    indices.copy_(torch.where(key > 0, 0x7FFFFFFF - (key & 0xFFFFFFFF), EMPTY))
