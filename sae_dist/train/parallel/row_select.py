"""The k best latents of every row over all parts of a dictionary: the same latents, ties included, as one rank chooses.

A part's own k best hold all of it that the whole can choose, whatever the other parts have. One gather of every part's
(value, index) keys moves 8 k bytes a row and part; two rounds move less once parts are many: every part first tells
the values of its 2 k / parts best, of which the k-th best bounds the k-th of all from below, and then only what reaches
the bound, which is little more than k keys a row in all, however many parts there are.
"""

import torch
from jaxtyping import Int
from sae_kernels import plain
from sae_kernels.reference import Selected
from torch import Tensor

from sae_dist.train.parallel.collectives import all_gather
from sae_dist.train.parallel.mesh import Mesh


def pays_two_rounds(k: int, parts: int, d_model: int) -> bool:
    """Whether one gather of all keys would move more than the rows themselves: 3 k parts > d_model."""
    return parts > 2 and 3 * k * parts > d_model


def row_best(
    mesh: Mesh, candidates: Selected, *, latents: range, k: int, width: int, two_rounds: bool, name: str
) -> Selected:
    """Of all parts' candidates the k best a row; at the places of other parts' latents the value is 0.

    `candidates` are this part's own best k, or all that it has; `width` is the most candidates that any part has.
    Indices, in and out, count within the part, which is `latents` of the whole. The places are the same on all ranks.
    """
    if mesh.feature.group is None:
        return candidates
    keys = plain.keys(candidates.values, candidates.indices + latents.start)
    keys = torch.nn.functional.pad(keys, (0, width - keys.shape[1]))
    everybody = _two_rounds(mesh, keys, k=k, name=name) if two_rounds else _one_round(mesh, keys, name=name)
    places = min(k, mesh.feature.size * width)  # the same for all rows, however few keys reached two rounds' bound
    everybody = torch.nn.functional.pad(everybody, (0, max(places - everybody.shape[1], 0)))
    chosen = plain.unpacked(everybody.topk(places).values)
    own = (chosen.values > 0) & (chosen.indices >= latents.start) & (chosen.indices < latents.stop)
    return Selected(torch.where(own, chosen.values, 0.0), torch.where(own, chosen.indices - latents.start, 0))


def _one_round(mesh: Mesh, keys: Int[Tensor, "rows width"], *, name: str) -> Int[Tensor, "rows all"]:
    return all_gather(mesh, mesh.feature, keys, name=name).permute(1, 0, 2).flatten(1)


def _two_rounds(mesh: Mesh, keys: Int[Tensor, "rows width"], *, k: int, name: str) -> Int[Tensor, "rows all"]:
    parts, (rows, width) = mesh.feature.size, keys.shape
    told = min(-(-2 * k // parts), width)
    values = (keys[:, :told] >> 32).int()  # bits of values of 0 and more order like integers
    known = all_gather(mesh, mesh.feature, values, name=f"{name}.bound").permute(1, 0, 2).flatten(1)
    bound = known.topk(k).values[:, -1] if k <= known.shape[1] else known.new_zeros(rows)
    reaches = ((keys >> 32) >= bound[:, None]) & ((keys >> 32) > 0)
    counts = all_gather(mesh, mesh.feature, reaches.sum(1, dtype=torch.int32), name=f"{name}.bound")  # [parts, rows]
    totals = counts.sum(1).tolist()
    flat = keys.new_zeros(max(totals))
    flat[: totals[mesh.feature.rank]] = keys[reaches]
    flats = all_gather(mesh, mesh.feature, flat, name=name)
    starts = torch.nn.functional.pad(counts.cumsum(0), (0, 0, 1, 0))  # places of a row's keys from each part
    out = keys.new_zeros(rows, max(int(starts[-1].max()), 1) if rows else 1)
    numbers = torch.arange(rows, device=keys.device)
    for part, total in enumerate(totals):
        row = torch.repeat_interleave(numbers, counts[part].long(), output_size=total)
        before = torch.nn.functional.pad(counts[part].long().cumsum(0), (1, 0))[:-1]
        place = torch.arange(total, device=keys.device) - before[row]
        out[row, starts[part][row] + place] = flats[part, :total]
    return out
