"""Sparse encoder and decoder operations; `reference` is the specification of every one.

The functions here choose by device: Triton kernels on a GPU; on a CPU `plain`, or `reference` where a gradient is
needed. A training step is `shard.Shard`. Importing this package does not import Triton.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels import plain, reference
from sae_kernels.reference import Active, Selected, packed

__all__ = [
    "Active",
    "Selected",
    "abs_topk_encode",
    "active_decode",
    "packed",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
]


def topk_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    product_dtype: torch.dtype | None = None,
) -> Selected:
    """TopK(relu((x - b_dec) W_enc + b_enc)), on a GPU without a [batch, n_latents] tensor."""
    if x.is_cuda:
        from sae_kernels import triton_ops

        return triton_ops.topk_encode(x, W_enc, b_enc, b_dec, k=k, product_dtype=product_dtype)
    ops = reference if _wants_gradient(x, W_enc, b_enc, b_dec) else plain
    return ops.topk_encode(x, W_enc, b_enc, b_dec, k=k, product_dtype=product_dtype)


def abs_topk_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
) -> Selected:
    """The k largest z = (x - b_dec) W_enc + b_enc of every row by size, of any sign. No gradients."""
    most = min(k, len(b_enc))
    up = topk_encode(x, W_enc, b_enc, b_dec, k=most)
    down = topk_encode(2 * b_dec - x, W_enc, -b_enc, b_dec, k=most)
    return plain.signed(plain.of_both_signs(up, down, k=k))


def threshold_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    theta: Float[Tensor, " n_latents"],
) -> Active:
    """All (x - b_dec) W_enc + b_enc that exceed theta >= 0, any number a row; no gradient."""
    with torch.no_grad():
        if x.is_cuda:
            from sae_kernels import triton_active

            return triton_active.threshold_encode(x, W_enc, b_enc, b_dec, theta=theta)
        return plain.threshold_encode(x, W_enc, b_enc, b_dec, theta=theta)


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    b_dec: Float[Tensor, " d_model"],
) -> Float[Tensor, "batch d_model"]:
    """x_hat = sum_j values_j W_dec[indices_j] + b_dec."""
    if values.is_cuda:
        from sae_kernels import triton_ops

        return triton_ops.sparse_decode(values, indices, W_dec, b_dec)
    return plain.sparse_decode(values, indices, W_dec, b_dec)


def active_decode(
    active: Active, W_dec: Float[Tensor, "n_latents d_model"], b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch d_model"]:
    """x_hat = sum over a row's active latents of value * W_dec[index], + b_dec; memory grows with their number."""
    if b_dec.is_cuda:
        from sae_kernels import triton_active

        return triton_active.active_decode(active, W_dec, b_dec)
    return plain.bag_sums(W_dec, active.indices, active.values, active.offsets) + b_dec


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
