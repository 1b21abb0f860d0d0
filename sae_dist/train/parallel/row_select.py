"""The k largest pre-activations of every row over all parts of a dictionary: the same latents as on one rank.

The k largest of a part contain all latents of it that can be chosen. One gather of every part's (value, index) keys
moves 8 k bytes a row and part. Two rounds move less once there are many parts: first every part sends the values of its
2 k / parts largest, whose k-th largest is a lower bound of the final k-th largest; then it sends only keys that reach
the bound, little more than k a row in all.
"""

import torch
from jaxtyping import Int
from sae_kernels import plain
from sae_kernels.reference import EMPTY, Selected
from torch import Tensor

from sae_dist.train.parallel.collectives import all_gather
from sae_dist.train.parallel.mesh import Mesh


def pays_two_rounds(k: int, parts: int, d_model: int) -> bool:
    """Whether one gather of all keys would move more than the rows themselves: 3 k parts > d_model."""
    return parts > 2 and 3 * k * parts > d_model


def row_best(
    mesh: Mesh, candidates: Selected, *, latents: range, k: int, width: int, two_rounds: bool, name: str
) -> Selected:
    """The k largest of all parts' candidates in every row; the places of other parts' latents are empty.

    `candidates` are the k largest of this part, or all that it has; `width` is the largest number of candidates of any
    part. Indices, in and out, count within the part, which is `latents` of the whole. Places agree on all ranks.
    """
    if mesh.feature.group is None:
        return candidates
    keys = plain.keys(candidates.values, candidates.indices.clamp_min(0) + latents.start)
    keys = torch.nn.functional.pad(keys, (0, width - keys.shape[1]))
    everybody = _two_rounds(mesh, keys, k=k, name=name) if two_rounds else _one_round(mesh, keys, name=name)
    places = min(k, mesh.feature.size * width)  # the same for all rows, however few keys reached the bound
    everybody = torch.nn.functional.pad(everybody, (0, max(places - everybody.shape[1], 0)))
    chosen = plain.unpacked(everybody.topk(places).values)
    own = (chosen.indices >= latents.start) & (chosen.indices < latents.stop)
    return Selected(torch.where(own, chosen.values, 0.0), torch.where(own, chosen.indices - latents.start, EMPTY))


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
