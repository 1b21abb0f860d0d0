"""The Triton kernels as torch operators with gradients: they work under torch.compile and with fake tensors.

Gradients, with dz = d_values where values > 0: d_x = sum_j dz_j W_enc[:, j], d_W_enc[:, j] = sum dz_j (x - b_dec),
d_b_enc[j] = sum dz_j, d_b_dec = -sum d_x; for the decoder d_values_j = g . W_dec[j] and d_W_dec[j] = sum v_j g.
"""

# ruff: noqa: ARG001 (a fake takes all of its operator's arguments)

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels import triton_sparse_decode
from sae_kernels.reference import Selected
from sae_kernels.triton_sparse_gradient import row_gradient, segments
from sae_kernels.triton_topk_encode import encode_select


@torch.library.custom_op("sae_kernels::topk_encode", mutates_args=())
def _encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, theta: Tensor | None, k: int, half: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if half else torch.float32
    rows, W = (x - b_dec).to(dtype).contiguous(), W_enc.t().to(dtype).contiguous()
    above = None if theta is None else theta.float().contiguous()
    values, indices, _ = encode_select(rows, W, b_enc.float().contiguous(), k=k, theta=above)
    return values, indices


@_encode.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, theta: Tensor | None, k: int, half: bool):
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("sae_kernels::sparse_decode", mutates_args=())
def _decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    bias = None if b_dec is None else b_dec.contiguous()
    return triton_sparse_decode.decode(values, indices, W_dec.contiguous(), bias)


@_decode.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None):
    return values.new_empty(values.shape[0], W_dec.shape[1], dtype=torch.float32)


@torch.library.custom_op("sae_kernels::gather_dot", mutates_args=())
def _gather_dot(e: Tensor, W_dec: Tensor, indices: Tensor) -> Tensor:
    return triton_sparse_decode.gather_dot(e.contiguous(), W_dec.contiguous(), indices)


@_gather_dot.register_fake
def _(e: Tensor, W_dec: Tensor, indices: Tensor):
    return e.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op("sae_kernels::row_gradient", mutates_args=())
def _row_gradient(rows: Tensor, weights: Tensor, indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    by_latent = segments(indices, n_latents=n_latents)
    out, sums = row_gradient(rows.contiguous(), weights.contiguous(), by_latent, n_latents=n_latents, with_sum=True)
    assert sums is not None
    return out, sums


@_row_gradient.register_fake
def _(rows: Tensor, weights: Tensor, indices: Tensor, n_latents: int):
    return rows.new_empty(n_latents, rows.shape[1], dtype=torch.float32), rows.new_empty(n_latents, dtype=torch.float32)


def _save_encode(ctx, inputs, output) -> None:
    x, W_enc, _, b_dec, _, _, ctx.half = inputs
    ctx.save_for_backward(x, W_enc, b_dec, *output)


def _encode_backward(ctx, d_values: Tensor, _) -> tuple[Tensor | None, ...]:
    x, W_enc, b_dec, values, indices = ctx.saved_tensors
    dtype = torch.bfloat16 if ctx.half else torch.float32
    d_z = torch.where(values > 0, d_values, 0.0)
    d_rows, d_b_enc = _row_gradient((x - b_dec).to(dtype), d_z, indices, W_enc.shape[1])
    d_x = _decode(d_z, indices, W_enc.t().to(dtype), None)
    return d_x.to(x.dtype), d_rows.t().to(W_enc.dtype), d_b_enc, -d_x.sum(0), None, None, None


def _save_decode(ctx, inputs, output) -> None:
    values, indices, W_dec, b_dec = inputs
    ctx.save_for_backward(values, indices, W_dec)
    ctx.has_bias = b_dec is not None


def _decode_backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, W_dec = ctx.saved_tensors
    d_rows, _ = _row_gradient(g, values, indices, W_dec.shape[0])
    return _gather_dot(g, W_dec, indices), None, d_rows.to(W_dec.dtype), g.sum(0) if ctx.has_bias else None


_encode.register_autograd(_encode_backward, setup_context=_save_encode)
_decode.register_autograd(_decode_backward, setup_context=_save_decode)


def topk_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    product_dtype: torch.dtype | None = None,
    theta: Float[Tensor, " n_latents"] | None = None,
) -> Selected:
    """`reference.topk_encode`, or of the values above theta only.

    The product's operands are bf16 (`product_dtype`, or W_enc's own dtype) or fp32; W_enc that is already bf16 and the
    transpose of a contiguous tensor is read as it is.
    """
    half = (product_dtype or W_enc.dtype) == torch.bfloat16
    return Selected(*_encode(x, W_enc, b_enc, b_dec, theta, k, half))


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    b_dec: Float[Tensor, " d_model"],
) -> Float[Tensor, "batch d_model"]:
    """`reference.sparse_decode`; an empty place is not read."""
    return _decode(values, indices, W_dec, b_dec)


def gather_dot(
    e: Float[Tensor, "batch d_model"], W_dec: Float[Tensor, "n_latents d_model"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """`reference.gather_dot`, without a gradient of its own: it is part of one."""
    return _gather_dot(e, W_dec, indices)
