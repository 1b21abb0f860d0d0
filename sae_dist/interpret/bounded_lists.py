"""Many small bounded lists at once: the entries with the smallest keys of every cell, in one pass over a stream.

The result is a function of the set of entries alone: neither their order nor the batches that brought them matter.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.interpret.token_hash import mix

EMPTY = torch.iinfo(torch.int64).max


class BoundedLists(NamedTuple):
    """Each cell's entries by ascending key; a key of EMPTY is a free place."""

    key: Int[Tensor, "cells size"]
    value: Float[Tensor, "cells size"]
    doc: Int[Tensor, "cells size"]
    pos: Int[Tensor, "cells size"]


def empty_lists(cells: int, size: int) -> BoundedLists:
    """`cells` empty lists of at most `size` entries."""
    return BoundedLists(
        torch.full((cells, size), EMPTY),
        torch.zeros(cells, size),
        torch.zeros(cells, size, dtype=torch.int64),
        torch.zeros(cells, size, dtype=torch.int64),
    )


def insert_(
    kept: BoundedLists,
    cell: Int[Tensor, " n"],
    *,
    key: Int[Tensor, " n"],
    value: Float[Tensor, " n"],
    doc: Int[Tensor, " n"],
    pos: Int[Tensor, " n"],
    block: int = 1,
) -> None:
    """Inserts n entries; of those in one cell, document and block of `block` positions only the smallest key is kept.

    Only better blocks can displace the best entry of a block, so dropping the others early loses nothing.
    """
    better = (key < kept.key[cell, -1]).nonzero().squeeze(-1)
    if not len(better):
        return
    cell, key, value, doc, pos = (t[better] for t in (cell, key, value, doc, pos))
    touched, cell = cell.unique(return_inverse=True)
    size = kept.key.shape[1]
    held = (kept.key[touched] != EMPTY).flatten().nonzero().squeeze(-1)
    cell = torch.cat([held // size, cell])
    key, value, doc, pos = (
        torch.cat([old[touched].flatten()[held], new]) for old, new in zip(kept, (key, value, doc, pos), strict=True)
    )
    order = key.argsort()
    if block > 1:
        passage = mix(doc) + (cell << 32 | pos // block)  # equal for two passages with a chance of 2**-64
        order = order[_first_of_each(passage[order])]
    order = order[cell[order].argsort(stable=True)]
    cell = cell[order]
    counts = cell.bincount(minlength=len(touched))
    rank = torch.arange(len(cell)) - (counts.cumsum(0) - counts)[cell]
    order, cell, rank = (t[rank < size] for t in (order, cell, rank))
    kept.key[touched] = EMPTY
    for old, new in zip(kept, (key, value, doc, pos), strict=True):
        old[touched[cell], rank] = new[order]


def _first_of_each(words: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Ascending indices of the first occurrence of every distinct word."""
    order = words.argsort(stable=True)
    words = words[order]
    first = torch.ones(len(words), dtype=torch.bool)
    first[1:] = words[1:] != words[:-1]
    return order[first].sort().values


def merge_cells(kept: BoundedLists, groups: Int[Tensor, "new old"]) -> BoundedLists:
    """One list for each row of `groups`, which names the cells to unite; an index of -1 names none."""
    size = kept.key.shape[1]
    key = kept.key[groups].masked_fill((groups < 0)[..., None], EMPTY).flatten(1)
    key, order = key.sort(dim=-1)
    order = order[:, :size]
    return BoundedLists(key[:, :size], *(column[groups].flatten(1).gather(1, order) for column in kept[1:]))
