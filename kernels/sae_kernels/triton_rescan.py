"""Rows whose buffer overflowed, computed again with one program a row: slow, exact, without a host round trip.

With exchangeable latents a buffer overflows once in 10^15 rows; for every other row the program reads one flag. A
row's bound may come from the tensor cores' sums, so a rescan starts without it and compares its own sums, in its own
order, only with each other.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton_select import COUNT_STRIDE, keep_largest, warps_for
from sae_kernels.triton_tiles import power_of_two

_LATENTS, _DEPTH = 64, 32


def rescan_warps(capacity: int) -> int:
    """Eight warps at most: sixteen would leave a thread 128 registers, and the largest buffer spilled."""
    return min(max(4, warps_for(capacity)), 8)


@triton.jit
def _rescan_kernel(x_ptr, W_ptr, b_ptr, theta_ptr, keys_ptr, count_ptr, overflow_ptr, n_latents, d_model,
                   x_stride, W_stride, k, CAPACITY: tl.constexpr, HAS_THETA: tl.constexpr, LATENTS: tl.constexpr,
                   DEPTH: tl.constexpr):  # fmt: skip
    """A row flagged in `overflow`: its k largest keys, found by a scan of all latents in order."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(overflow_ptr + row) == 0:
        return
    keys = keys_ptr + row * CAPACITY
    count = tl.sum(tl.zeros((LATENTS,), dtype=tl.int32), 0)
    bits, low = count, count + 0x7FFFFFFF
    for start in range(0, n_latents, LATENTS):
        latent = start + tl.arange(0, LATENTS)
        z = tl.zeros((LATENTS,), dtype=tl.float32)
        for done in range(0, d_model, DEPTH):
            dim = done + tl.arange(0, DEPTH)
            x = tl.load(x_ptr + row * x_stride + dim, mask=dim < d_model, other=0.0)
            address = W_ptr + latent.to(tl.int64)[:, None] * W_stride + dim[None, :]
            W = tl.load(address, mask=(latent < n_latents)[:, None] & (dim < d_model)[None, :], other=0.0)
            z += tl.sum(W.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        z += tl.load(b_ptr + latent, mask=latent < n_latents, other=0.0)
        bound = bits.to(tl.float32, bitcast=True)
        keep = ((z > bound) | ((z == bound) & (0x7FFFFFFF - latent > low))) & (latent < n_latents)
        if HAS_THETA:
            keep = keep & (z > tl.load(theta_ptr + latent, mask=latent < n_latents, other=0.0))
        target = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        key = (z.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)
        tl.store(keys + target, key, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
        tl.debug_barrier()
        if (count + LATENTS > CAPACITY) | (start + LATENTS >= n_latents):
            bits, low, count = keep_largest(keys, count, k, CAPACITY)
    tl.store(count_ptr + row * COUNT_STRIDE, count)


def rescan_(
    x: Tensor, W: Tensor, b_enc: Tensor, keys: Tensor, count: Tensor, overflow: Tensor, *, k: int, theta: Tensor | None
) -> None:
    """Replace the kept keys of every row whose `overflow` is set by the k largest of a scan over all latents."""
    (batch, d_model), capacity = x.shape, keys.shape[1]
    latents = min(_LATENTS, power_of_two(capacity - k + 1) // 2)  # a block must fit beside the k kept
    _rescan_kernel[(batch,)](
        x, W, b_enc, theta if theta is not None else b_enc, keys, count, overflow, W.shape[0], d_model,
        x.stride(0), W.stride(0), k, CAPACITY=capacity, HAS_THETA=theta is not None, LATENTS=latents, DEPTH=_DEPTH,
        num_warps=rescan_warps(capacity), num_stages=1,
    )  # fmt: skip
