"""The operations in plain torch without a [batch, n_latents] tensor: for any device, where no kernel is to be had.

Same names and signatures as in `reference`, and the same results up to the order of sums.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_kernels.reference import Gradients, Selected, StepStatistics

TILE = 4096  # latents per product: 64 MiB of pre-activations at a batch of 4,096
_LAST = 0xFFFFFFFF


def topk_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    product_dtype: torch.dtype | None = None,
) -> Selected:
    """`reference.topk_encode`, one tile of latents after the other against a running top k."""
    rows = _rounded(x - b_dec, product_dtype)
    best = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    for start in range(0, W_enc.shape[1], TILE):
        tile = slice(start, start + TILE)
        z = torch.addmm(b_enc[tile], rows, _rounded(W_enc[:, tile], product_dtype))
        best = torch.cat([best, _keys(z, start)], 1)
        best = best.topk(min(k, best.shape[1]), dim=-1).values
    return _selected(best)


def _keys(z: Float[Tensor, "batch tile"], start: int) -> Tensor:
    """One integer for (value, index): larger for the larger value of relu(z), then for the lower index.

    torch.topk leaves the order of ties open; distinct keys have none. Bits of non-negative floats order like integers.
    """
    indices = torch.arange(start, start + z.shape[1], device=z.device)
    active = torch.where(z > 0, z, torch.zeros_like(z))
    return (active.float().view(torch.int32).long() << 32) | (_LAST - indices)


def _selected(keys: Tensor) -> Selected:
    return Selected((keys >> 32).int().view(torch.float32), _LAST - (keys & _LAST))


def _rounded(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    return a if dtype is None else a.to(dtype).to(a.dtype)


def sparse_decode(
    values: Float[Tensor, "batch k"], indices: Tensor, W_dec: Float[Tensor, "n_latents d_model"], b_dec: Tensor
) -> Float[Tensor, "batch d_model"]:
    """`reference.sparse_decode` without its [batch, k, d_model] intermediate."""
    return torch.nn.functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec


def topk_gradients(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    W_dec: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    variance: float | Float[Tensor, ""],
    dead: Bool[Tensor, " n_latents"],
    k_aux: int,
    aux_coefficient: float,
    product_dtype: torch.dtype | None = None,
) -> tuple[Gradients, StepStatistics]:
    """`reference.topk_gradients`, written out so that only active latents are touched.

    With g = d loss / d x_hat = -2 e / (batch * variance): dW_dec[j] = sum v_j g, dz_j = g . W_dec[j], dW_enc[:, j] =
    sum dz_j (x - b_dec), db_enc[j] = sum dz_j, db_dec = sum g - W_enc db_enc; likewise AuxK with e - e_hat for e.
    """
    n_latents = W_dec.shape[0]
    batch, d_model = x.shape
    scale = 2 / (batch * float(variance))
    rows = _rounded(x - b_dec, product_dtype)
    d_rows_enc, d_dec = x.new_zeros(n_latents, d_model), torch.zeros_like(W_dec)
    d_b_enc = torch.zeros_like(b_enc)

    def accumulate(selected: Selected, g: Tensor) -> None:
        for values, indices in zip(selected.values.unbind(1), selected.indices.unbind(1), strict=True):
            d_z = torch.where(values > 0, torch.einsum("bd,bd->b", g, W_dec[indices]), 0.0)
            d_dec.index_add_(0, indices, values[:, None] * g)
            d_rows_enc.index_add_(0, indices, d_z[:, None] * rows)
            d_b_enc.index_add_(0, indices, d_z)

    selected = topk_encode(x, W_enc, b_enc, b_dec, k=k, product_dtype=product_dtype)
    residual = x - sparse_decode(*selected, W_dec, b_dec)
    g = -scale * residual
    accumulate(selected, g)
    d_b_dec = g.sum(0)

    aux_squared_error = x.new_zeros(())
    places = torch.nonzero(dead).squeeze(1) if k_aux else torch.empty(0, dtype=torch.int64, device=x.device)
    if len(places):
        aux = topk_encode(
            x, W_enc[:, places], b_enc[places], b_dec, k=min(k_aux, len(places)), product_dtype=product_dtype
        )
        aux = Selected(aux.values, places[aux.indices])
        remaining = residual - sparse_decode(*aux, W_dec, torch.zeros_like(b_dec))
        aux_squared_error = remaining.square().sum()
        accumulate(aux, -scale * aux_coefficient * min(len(places) / k_aux, 1.0) * remaining)

    d_b_dec -= _rounded(W_enc, product_dtype) @ d_b_enc
    fired = torch.zeros(n_latents, dtype=torch.bool, device=x.device)
    fired[selected.indices[selected.values > 0]] = True
    statistics = StepStatistics(residual.square().sum(), aux_squared_error, (selected.values > 0).sum(), fired)
    return Gradients(d_rows_enc.t(), d_dec, d_b_enc, d_b_dec), statistics
