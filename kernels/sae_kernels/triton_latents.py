"""The whole update of a latent by one program: gradient row, projection, Adam, unit norm, rounding, norm statistics.

The gradient of a row lives in registers only. A parameter moves 24 bytes (its value and two moments, read and written,
fp32) and 2 for the bf16 copy that the product reads, where separate kernels move 8 more for the gradient and read the
row again to project and to normalise it.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sae_kernels.triton_sparse_gradient import Segments, segment_sum, weight_sum
from sae_kernels.triton_tiles import power_of_two

PAIRS = 2  # gathered rows in flight; more take registers from other programs (H200: 2 0.35 ms, 4 0.41, 8 0.61)


class ParameterState(NamedTuple):
    """A parameter [n_latents, d_model] or [n_latents] and Adam's moments of it, fp32."""

    value: Tensor
    first: Tensor
    second: Tensor


class WeightedPairs(NamedTuple):
    """The pairs that gradient rows are sums of: weights [batch, k] by (token, place), and the rows they multiply."""

    rows: Tensor  # [batch or more, d_model]
    weights: Tensor  # fp32 [batch, k]
    by_latent: Segments
    source: Tensor | None = None  # int32 [batch, k]: the row that a weight multiplies; None: that of its token


class LinearRows(NamedTuple):
    """A further part of every gradient row: factors times one row, or times the parameter's own row."""

    factors: Tensor  # [n_latents, sites]: for each of equal parts of d_model
    row: Tensor | None  # [d_model]; None: the own row


@triton.jit
def _adam(p, g, m, v, schedule_ptr, step, beta2, eps):
    """One Adam step with the scalars of `step`, a `schedule_row`."""
    at = schedule_ptr + step * 5
    m = m + tl.load(at + 3) * (g - m)
    v = v * beta2 + tl.load(at + 4) * g * g
    denominator = tl.sqrt(v * tl.load(at + 2)) + eps
    return p - tl.load(at) * (m * tl.load(at + 1) / denominator), m, v


@triton.jit
def _unit(p):
    norm = tl.sqrt(tl.sum(p * p, 0))
    return p / tl.maximum(norm, 1e-12)


@triton.jit
def _update_kernel(p_ptr, m_ptr, v_ptr, rounded_ptr, gradient_ptr, norm_ptr, bias_ptr, bias_m_ptr, bias_v_ptr,
                   bias_gradient_ptr, slots_ptr, extra_ptr, extra_bias_ptr, rows_ptr, weights_ptr, pairs_ptr,
                   offsets_ptr, source_ptr, linear_ptr, row_ptr, schedule_ptr,
                   step, beta2, eps, k, d_model, row_stride,
                   SOURCE: tl.constexpr, DENSE: tl.constexpr, UNIT: tl.constexpr, ROUND: tl.constexpr,
                   BIAS: tl.constexpr, EXTRA: tl.constexpr, LINEAR: tl.constexpr, SITES: tl.constexpr,
                   PAIRS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """One latent: its gradient from its pairs (or DENSE, from memory), then Adam; UNIT projects and normalises."""
    latent = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DEPTH)
    inside = dim < d_model
    begin, end = 0, 0
    if not DENSE:
        begin, end = tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1)
    if DENSE:
        g = tl.load(gradient_ptr + latent * d_model + dim, mask=inside, other=0.0)
    else:
        g = segment_sum(rows_ptr, weights_ptr, pairs_ptr, source_ptr, begin, end, k, row_stride, dim, d_model,
                        SOURCE, PAIRS, DEPTH)  # fmt: skip
    slot = 0
    if EXTRA:
        slot = tl.load(slots_ptr + latent)
        extra = extra_ptr + slot.to(tl.int64) * d_model + dim
        g += tl.load(extra, mask=inside & (slot >= 0), other=0.0)
    address = latent * d_model + dim
    p = tl.load(p_ptr + address, mask=inside, other=0.0)
    if LINEAR == "row":
        g += tl.load(linear_ptr + latent) * tl.load(row_ptr + dim, mask=inside, other=0.0)
    if LINEAR == "own":
        site = dim // (d_model // SITES)
        g += tl.load(linear_ptr + latent * SITES + site, mask=inside, other=0.0) * p
    m = tl.load(m_ptr + address, mask=inside, other=0.0)
    v = tl.load(v_ptr + address, mask=inside, other=0.0)
    tl.store(norm_ptr + latent, tl.sum(g * g, 0))
    if UNIT:
        g = g - tl.sum(g * p, 0) * p
    p, m, v = _adam(p, g, m, v, schedule_ptr, step, beta2, eps)
    if UNIT:
        p = _unit(p)
    tl.store(p_ptr + address, p, mask=inside)
    tl.store(m_ptr + address, m, mask=inside)
    tl.store(v_ptr + address, v, mask=inside)
    if ROUND:
        tl.store(rounded_ptr + address, p.to(tl.bfloat16), mask=inside)
    if BIAS:
        if DENSE:
            g_bias = tl.load(bias_gradient_ptr + latent)
        else:
            g_bias = weight_sum(weights_ptr, pairs_ptr, begin, end)
            if EXTRA:
                g_bias += tl.load(extra_bias_ptr + slot, mask=slot >= 0, other=0.0)
            if LINEAR == "row":
                g_bias += tl.load(linear_ptr + latent)
            tl.store(bias_gradient_ptr + latent, g_bias)
        b, b_m, b_v = tl.load(bias_ptr + latent), tl.load(bias_m_ptr + latent), tl.load(bias_v_ptr + latent)
        b, b_m, b_v = _adam(b, g_bias, b_m, b_v, schedule_ptr, step, beta2, eps)
        tl.store(bias_ptr + latent, b)
        tl.store(bias_m_ptr + latent, b_m)
        tl.store(bias_v_ptr + latent, b_v)


def warps_for(d_model: int) -> int:
    """Eight numbers a thread up to d_model 2,048, so that value, moments and gathered rows fit its registers."""
    return min(max(power_of_two(d_model) // 256, 1), 8)


def schedule_row(*, step: int, lr: float, betas: tuple[float, float]) -> tuple[float, ...]:
    """lr, 1 / (1 - beta1^step), 1 / (1 - beta2^step), 1 - beta1, 1 - beta2; 1 - 0.999 in fp32 would be off by 1e-5."""
    beta1, beta2 = betas
    return lr, 1 / (1 - beta1**step), 1 / (1 - beta2**step), 1 - beta1, 1 - beta2


def update_latents_(
    parameter: ParameterState, source: WeightedPairs | Tensor, *, schedule: Tensor, step: int,
    betas: tuple[float, float], eps: float, norms: Tensor, unit: bool, rounded: Tensor | None = None,
    bias: ParameterState | None = None, bias_gradient: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None, linear: LinearRows | None = None,
) -> None:  # fmt: skip
    """Adam on every row of a parameter [n_latents, d_model], in place, from its pairs or from a dense gradient.

    `schedule` [steps, 5] holds `schedule_row` of every step so far. `norms` [n_latents] gets each row's ||g||^2.
    `unit` removes the gradient along each row and keeps rows at norm 1; `rounded` gets the bf16 copy. With `bias`, its
    gradient (the sum of the weights) is written to `bias_gradient` (dense: read from it) and applied.
    `extra` (slots [n_latents], gradient rows, bias) is added where a latent's slot is not -1, and `linear` to all.
    """
    n_latents, d_model = parameter.value.shape
    dense = source if isinstance(source, Tensor) else None
    pairs = None if isinstance(source, Tensor) else source
    none, rows_of = norms, None if pairs is None else pairs.source
    _update_kernel[(n_latents,)](
        *parameter, none if rounded is None else rounded, none if dense is None else dense, norms,
        *(bias or (none, none, none)), none if bias_gradient is None else bias_gradient,
        *(extra or (none, none, none)),
        *((none, none, none, none) if pairs is None else (pairs.rows, pairs.weights, *pairs.by_latent)),
        none if rows_of is None else rows_of,
        *((none, none) if linear is None else (linear.factors, none if linear.row is None else linear.row)),
        schedule, step, betas[1], eps,
        1 if pairs is None else pairs.weights.shape[1], d_model, 0 if pairs is None else pairs.rows.stride(0),
        SOURCE=rows_of is not None, DENSE=dense is not None, UNIT=unit, ROUND=rounded is not None,
        BIAS=bias is not None, EXTRA=extra is not None,
        LINEAR="" if linear is None else "own" if linear.row is None else "row",
        SITES=1 if linear is None else linear.factors.shape[1],
        PAIRS=PAIRS, DEPTH=power_of_two(d_model), num_warps=warps_for(d_model),
    )  # fmt: skip
