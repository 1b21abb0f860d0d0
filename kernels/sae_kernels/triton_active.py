"""BatchTopK and JumpReLU without [batch, n_latents]: rows with different numbers of active latents.

Both come from the per-row selection with a width: a row that fills its width may have more, and is selected again four
times as wide. The result is exact, whatever the width; a good guess saves the second selection.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kernels.reference import Active, Selected, padded
from sae_kernels.triton_ops import sparse_decode, topk_encode


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
    return _packed(_above(x, W_enc, b_enc, b_dec, theta, width, product_dtype))


def batch_topk_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    width: int | None = None,
    product_dtype: torch.dtype | None = None,
) -> Active:
    """`reference.batch_topk` of the pre-activations: the batch * k largest of relu(z), ties by row, then latent.

    The rows' `width` best (default 4 k) hold the batch's best unless a row's last one is itself chosen.
    """
    n_latents = W_enc.shape[1]
    width = min(width or 4 * k, n_latents)
    selected = topk_encode(x, W_enc, b_enc, b_dec, k=width, product_dtype=product_dtype)
    while True:
        chosen = _largest(selected.values.detach(), x.shape[0] * k)
        full = chosen[:, -1].nonzero().squeeze(1)
        if width == n_latents or not len(full):
            return _packed(Selected(torch.where(chosen, selected.values, 0.0), selected.indices))
        width = min(4 * width, n_latents)
        wider = topk_encode(x[full], W_enc, b_enc, b_dec, k=width, product_dtype=product_dtype)
        selected = _replaced(selected, full, wider)


def jumprelu_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    theta: Float[Tensor, " n_latents"],
    bandwidth: float,
    width: int = 128,
    product_dtype: torch.dtype | None = None,
) -> tuple[Selected, Float[Tensor, " batch"]]:
    """`reference.jumprelu` of the pre-activations and each row's L0, with its gradients, for theta >= bandwidth / 2.

    The latents within half a bandwidth below theta have the value 0 and are among the places returned: theta's gradient
    needs them. Below bandwidth / 2 the box would reach negative pre-activations, which are not kept.
    """
    if bool((theta < bandwidth / 2).any()):
        raise ValueError(f"theta={float(theta.min())} is below bandwidth/2={bandwidth / 2}; clamp it or narrow the box")
    z, indices = _above(x, W_enc, b_enc, b_dec, theta.detach() - bandwidth / 2, width, product_dtype)
    level = theta[indices]
    gate = ((z > level) & (z > 0)).to(z.dtype)
    near = (((z - level).abs() < bandwidth / 2) & (z > 0)).to(z.dtype).detach()
    box = near * (level - level.detach()) / bandwidth  # 0 in value, carries the gradient
    values = z * gate - level.detach() * box
    return Selected(values, indices), (gate - box).sum(-1)


def active_decode(
    active: Active, W_dec: Float[Tensor, "n_latents d_model"], b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch d_model"]:
    """`reference.active_decode`, by rows padded to the widest."""
    return sparse_decode(*padded(active), W_dec, b_dec)


def _above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, theta: Tensor, width: int, product_dtype: torch.dtype | None
) -> Selected:
    """All z > max(theta, 0) of every row, descending, padded to the widest row or to `width`."""
    n_latents = W_enc.shape[1]
    width = min(width, n_latents)
    selected = topk_encode(x, W_enc, b_enc, b_dec, k=width, product_dtype=product_dtype, theta=theta)
    while width < n_latents:
        full = (selected.values[:, -1] > 0).nonzero().squeeze(1)
        if not len(full):
            break
        width = min(4 * width, n_latents)
        wider = topk_encode(x[full], W_enc, b_enc, b_dec, k=width, product_dtype=product_dtype, theta=theta)
        selected = _replaced(selected, full, wider)
    return selected


def _replaced(selected: Selected, rows: Tensor, wider: Selected) -> Selected:
    grown = (0, wider.values.shape[1] - selected.values.shape[1])
    values, indices = (torch.nn.functional.pad(old, grown) for old in selected)
    return Selected(values.index_copy(0, rows, wider.values), indices.index_copy(0, rows, wider.indices))


def _largest(values: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest positive values; a stable sort of rows in order keeps the order of ties."""
    flat = values.flatten()
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order] = True
    return chosen.view_as(values) & (values > 0)


def _packed(selected: Selected) -> Active:
    inside = selected.values > 0
    offsets = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))
    return Active(selected.values[inside], selected.indices[inside], offsets)
