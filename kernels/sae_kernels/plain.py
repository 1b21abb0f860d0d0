"""The operations in plain torch without a [batch, n_latents] tensor: for any device without a kernel.

Same names and signatures as in `reference`, and the same results up to the order of sums.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels.reference import EMPTY, Active, Selected

TILE = 4096  # latents per product: 64 MiB of pre-activations at a batch of 4,096
ELEMENTS = 1 << 22  # of gathered rows at once: 16 MiB
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
    return select(rounded(x - b_dec, product_dtype), W_enc, b_enc, k=k, product_dtype=product_dtype)


def select(
    rows: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    *,
    k: int,
    product_dtype: torch.dtype | None = None,
) -> Selected:
    """The k largest of relu(rows W_enc + b_enc) a row, for rows that are x - b_dec, rounded."""
    best = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, W_enc.shape[1], TILE):
        tile = slice(start, start + TILE)
        z = torch.addmm(b_enc[tile], rows, rounded(W_enc[:, tile].float(), product_dtype))
        best = torch.cat([best, keys(z, torch.arange(start, start + z.shape[1], device=z.device))], 1)
        best = best.topk(min(k, best.shape[1]), dim=-1).values
    return unpacked(best)


def threshold_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    theta: Float[Tensor, " n_latents"],
    product_dtype: torch.dtype | None = None,
) -> Active:
    """`reference.threshold` of the pre-activations: z where z > theta, for theta >= 0."""
    rows, found = rounded(x - b_dec, product_dtype), []
    for start in range(0, W_enc.shape[1], TILE):
        tile = slice(start, start + TILE)
        z = torch.addmm(b_enc[tile], rows, rounded(W_enc[:, tile].float(), product_dtype))
        row, latent = ((z > theta[tile]) & (z > 0)).nonzero(as_tuple=True)
        found.append((row, latent + start, z[row, latent]))
    row, latent, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = values.argsort(descending=True, stable=True)  # latents ascend where values tie
    order = order[row[order].argsort(stable=True)]
    offsets = torch.bincount(row, minlength=len(x)).cumsum(0)
    return Active(values[order], latent[order], torch.nn.functional.pad(offsets, (1, 0)))


def keys(z: Float[Tensor, "batch some"], indices: Tensor) -> Int[Tensor, "batch some"]:
    """One integer for (value, index): larger for the larger value of relu(z), then for the lower index.

    torch.topk leaves the order of ties open; distinct keys have none. Bits of non-negative floats order like integers.
    """
    active = torch.where(z > 0, z, torch.zeros_like(z))
    return (active.float().view(torch.int32).long() << 32) | (_LAST - indices)


def unpacked(keys: Int[Tensor, "batch some"]) -> Selected:
    """The inverse of `keys`; what is not positive is an empty place."""
    return Selected((keys >> 32).int().view(torch.float32), torch.where(keys > _LAST, _LAST - (keys & _LAST), EMPTY))


def of_both_signs(up: Selected, down: Selected, *, k: int) -> Selected:
    """The k largest by size, from the largest of z and of -z; index 2 j stands for z of latent j, 2 j + 1 for -z."""
    values = torch.cat([up.values, down.values], 1)
    indices = torch.cat([2 * up.indices, 2 * down.indices + 1], 1)  # an empty place has the value 0
    return unpacked(keys(values, indices.clamp_min(0)).topk(k).values)


def signed(selected: Selected) -> Selected:
    """Latents and their z, of any sign, from what `of_both_signs` gives."""
    negative = selected.there & (selected.indices & 1).bool()
    return Selected(torch.where(negative, -selected.values, selected.values), selected.indices >> 1)  # -1 stays -1


def rounded(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`a` with the precision of `dtype`, in its own dtype."""
    return a if dtype is None else a.to(dtype).to(a.dtype)


def sparse_decode(
    values: Float[Tensor, "batch k"], indices: Tensor, W_dec: Float[Tensor, "n_latents d_model"], b_dec: Tensor
) -> Float[Tensor, "batch d_model"]:
    """`reference.sparse_decode` without its [batch, k, d_model] intermediate; W_dec may be bf16, sums are fp32."""
    return weighted_rows(Selected(values, indices), W_dec) + b_dec


def weighted_rows(selected: Selected, W_dec: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, "batch d_model"]:
    """sum_j values_j W_dec[indices_j], in fp32 whatever W_dec is stored in."""
    values, indices = selected
    if W_dec.dtype == torch.float32:
        rows = indices.clamp_min(0)  # of an empty place any: its value is 0
        return torch.nn.functional.embedding_bag(rows, W_dec, per_sample_weights=values, mode="sum")
    step = max(ELEMENTS // (W_dec.shape[1] * values.shape[1]), 1)
    pieces = zip(values.split(step), indices.split(step), strict=True)
    return torch.cat([torch.einsum("bk,bkd->bd", v, W_dec[i].float()) for v, i in pieces])


def bag_sums(
    source: Float[Tensor, "rows d_model"], index: Int[Tensor, " pairs"], weights: Float[Tensor, " pairs"],
    offsets: Int[Tensor, " edges"],
) -> Float[Tensor, "edges-1 d_model"]:  # fmt: skip
    """Bag b is sum of weights_p source[index_p] over p in offsets[b]:offsets[b + 1], in this order."""
    begin, end = int(offsets[0]), int(offsets[-1])
    if begin == end:
        return source.new_zeros(len(offsets) - 1, source.shape[1])
    return torch.nn.functional.embedding_bag(
        index[begin:end], source, offsets - begin, per_sample_weights=weights[begin:end], mode="sum",
        include_last_offset=True,
    )  # fmt: skip


def mean_z(
    row: Float[Tensor, " d_model"], W_enc: Float[Tensor, "n_latents d_model"], b_enc: Float[Tensor, " n_latents"],
    *, product_dtype: torch.dtype | None,
) -> Float[Tensor, " n_latents"]:  # fmt: skip
    """The z of one row, in fp32; W_enc's rows are latents and are rounded as for the batch's product.

    Sums of rows, which do not depend on the number of threads as those of a matrix product may.
    """
    return torch.cat([(rounded(some.float(), product_dtype) * row).sum(1) for some in W_enc.split(TILE)]) + b_enc


def add_linear_(
    gradient: Float[Tensor, "some d_model"], factors: Float[Tensor, "some sites"],
    rows: Float[Tensor, "some d_model"],
) -> None:  # fmt: skip
    """gradient[j] += factors[j, s] * rows[j] in the s-th of equal parts of d_model."""
    of_sites = rows.float().unflatten(1, (factors.shape[1], -1))
    gradient.unflatten(1, (factors.shape[1], -1)).addcmul_(factors[:, :, None], of_sites)


def gather_dot(
    e: Float[Tensor, "errors d_model"], W_dec: Float[Tensor, "n_latents d_model"], selected: Selected,
    source: Int[Tensor, "batch k"] | None = None,
) -> Float[Tensor, "batch k"]:  # fmt: skip
    """e . W_dec[j] at the selected latents, 0 at empty places: `reference.gather_dot` for those that count.

    `source` says which row of e each place takes, None: its own.
    """
    out = torch.zeros_like(selected.values)
    places, rows = selected.there.t().nonzero(as_tuple=True)
    step = max(ELEMENTS // W_dec.shape[1], 1)
    for place, row in zip(places.split(step), rows.split(step), strict=True):
        of = row if source is None else source[row, place]
        out[row, place] = torch.einsum("pd,pd->p", e[of], W_dec[selected.indices[row, place]].float())
    return out
