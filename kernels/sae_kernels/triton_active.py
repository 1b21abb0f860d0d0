"""Selection by thresholds without [batch, n_latents]: rows have different numbers of active latents.

Each row's largest `width` are selected first. A row that fills its width may have more, and is selected again four
times as wide, or in plain torch beyond what a program can rank. The result is exact for any width; a good first guess
avoids the second selection.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kernels import plain
from sae_kernels.lines import split_into_lines
from sae_kernels.reference import Active, packed
from sae_kernels.triton_ops import sparse_decode, topk_encode

WIDEST = 2048  # latents of a row that a program selects: beyond, its keys do not fit registers


def threshold_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    theta: Float[Tensor, " n_latents"],
    width: int = 128,
    product_dtype: torch.dtype | None = None,
) -> Active:
    """`reference.threshold` of the pre-activations: z where z > theta, for theta >= 0."""
    return _above(x, W_enc, b_enc, b_dec, theta, width, product_dtype)


def active_decode(
    active: Active, W_dec: Float[Tensor, "n_latents d_model"], b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch d_model"]:
    """`reference.active_decode`, by lines of twice the mean row's latents (lines.py)."""
    rows = len(active.offsets) - 1
    lines = split_into_lines(active.rows, rows=rows, width=max(1, 2 * len(active.indices) // max(1, rows)))
    laid = lines.selected(active.values, active.indices)
    parts = sparse_decode(*laid, W_dec, torch.zeros_like(b_dec))
    return lines.summed(parts) + b_dec


def _above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, theta: Tensor, width: int, product_dtype: torch.dtype | None
) -> Active:
    """All z > max(theta, 0) of every row, descending."""
    n_latents = W_enc.shape[1]
    width = min(width, n_latents)
    found = packed(topk_encode(x, W_enc, b_enc, b_dec, k=width, product_dtype=product_dtype, theta=theta))
    full = (found.offsets.diff() == width).nonzero().squeeze(1)
    while width < n_latents and len(full):
        width = min(4 * width, n_latents)
        if width > WIDEST:
            wider = plain.threshold_encode(x[full], W_enc, b_enc, b_dec, theta=theta, product_dtype=product_dtype)
            return _replaced(found, full, wider)
        wider = packed(topk_encode(x[full], W_enc, b_enc, b_dec, k=width, product_dtype=product_dtype, theta=theta))
        found = _replaced(found, full, wider)
        full = full[wider.offsets.diff() == width]
    return found


def _replaced(active: Active, rows: Tensor, wider: Active) -> Active:
    """`active` with the given rows replaced by those of `wider`."""
    old = ~torch.isin(active.rows, rows)
    row = torch.cat([active.rows[old], rows[wider.rows]])
    order = row.argsort(stable=True)
    values = torch.cat([active.values[old], wider.values])[order]
    indices = torch.cat([active.indices[old], wider.indices])[order]
    counts = torch.bincount(row, minlength=len(active.offsets) - 1)
    return Active(values, indices, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
