"""The largest pre-activations of a whole batch over all rows and parts (BatchTopK): the same as on one rank.

Every rank selects the `width` largest of its own part for its own rows. All ranks then find the cut, the smallest
(value, row, latent) that is among the batch's largest: bits of non-negative floats order like integers, so the cut is
found digit by digit from counts. A row whose last candidate is chosen may have more: such rows are selected again twice
as wide, which can only raise the cut, and the cut is found again. So the choice is exact for any width. A rank holds no
more than the chosen pairs, and 2 width candidates a row.

A cut takes 4 all-reduces of 257 counts and one of a single count; each rank of W receives 2 (W - 1) / W * 8 bytes a
count. Where values tie at the cut, it takes one more of 257 for each 8 bits of batch * n_latents. Widening makes at
most log2(latents of a part / width) further cuts.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_kernels.reference import Selected
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.train.parallel.collectives import sum_counts
from sae_dist.train.parallel.mesh import Mesh

DIGIT = 8  # bits that one all-reduce finds
VALUE_BITS = 31  # of a float that is not negative
NAME = "threshold"  # of the exchanges
WIDTH = 4  # times k / parts candidates a row and part at first: few rows choose more
LEAST_WIDTH = 16
MOST = 64  # times k: the most candidates a row, in the mean over the batch, that widening may hold

SelectFunction = Callable[[Tensor, int], Selected]  # (rows, k) -> the k largest of this part for each row


class BatchSelection(NamedTuple):
    """The chosen pairs of this rank's rows and latents, sorted by row and descending within a row."""

    row: Int[Tensor, " pairs"]  # within this rank's rows
    latent: Int[Tensor, " pairs"]  # within this rank's part
    values: Float[Tensor, " pairs"]
    smallest: float | None  # the smallest chosen value of a batch that is counted; None: nothing is positive
    widened: int  # rows of this rank that were selected again


class _Block(NamedTuple):
    """Candidates of some rows, descending; pairs whose choice is final are a block of width 1."""

    rows: Int[Tensor, " some"]
    selected: Selected


class _Cut(NamedTuple):
    """The cut: keys above `key` are chosen, and keys equal to it up to position `last`."""

    key: int | None  # None: nothing is positive; 1 is the key of the smallest positive value
    last: int | None  # position row * n_latents + latent in the whole batch; None: all positions

    def chosen(self, block: _Block, position: Callable[[Tensor, Tensor], Tensor]) -> Bool[Tensor, "some width"]:
        keys = _keys(block)
        if self.key is None:
            return torch.zeros_like(keys, dtype=torch.bool)
        if self.last is None:
            return keys >= self.key
        ties, places = (keys == self.key).nonzero(as_tuple=True)
        chosen = keys > self.key
        chosen[ties, places] = position(block.rows[ties], block.selected.indices[ties, places]) <= self.last
        return chosen


def initial_width(k: int, parts: int) -> int:
    """How many candidates a row a part selects at first."""
    return max(-(-WIDTH * k // parts), LEAST_WIDTH)


def batch_best(
    mesh: Mesh,
    select: SelectFunction,
    rows: Tensor,
    *,
    first_row: int,
    batch: int,
    latents: range,
    n_latents: int,
    k: int,
    counted: bool,
    width: int,
    at_once: int | None = None,
) -> BatchSelection:
    """The batch * k largest positive values of all rows and parts, ties by row, then latent.

    If not `counted`, all positive values; k is then the expected number a row. `rows` are this rank's rows of the
    batch, the first of them number `first_row`; `select` reads `at_once` of them at a time. This rank's part is
    `latents` of `n_latents`. All ranks call this together. UserError on all ranks where widening would take too much
    memory.
    """

    def selected(numbers: Tensor) -> list[_Block]:
        parts = numbers.split(at_once or len(numbers)) if len(numbers) else ()
        return [_Block(part, select(rows if len(part) == len(rows) else rows[part], width)) for part in parts]

    def position(row: Tensor, latent: Tensor) -> Tensor:
        return (first_row + row) * n_latents + latents.start + latent

    width, widened = min(width, len(latents)), 0
    every = torch.arange(len(rows), device=rows.device)
    settled, fresh = _Block(every[:0], Selected(rows.new_empty(0, 1).float(), every.new_empty(0, 1))), selected(every)
    while True:
        bits = (batch * n_latents).bit_length()
        cut = _cut(mesh, [settled, *fresh], position, count=batch * k, bits=bits) if counted else _Cut(1, None)
        masks = [cut.chosen(block, position) for block in [settled, *fresh]]
        full = every[:0]
        if width < len(latents):
            more = (block.rows[mask[:, -1]] for block, mask in zip(fresh, masks[1:], strict=True))
            full = torch.cat([full, *more])
        settled = _pairs([settled, *fresh], masks)
        n_full = int(sum_counts(mesh, mesh.world, every.new_full((1,), len(full)), name=NAME))
        if not n_full:
            values, latent = settled.selected
            smallest = _float(cut.key) if counted and cut.key is not None else None
            return BatchSelection(settled.rows, latent.squeeze(1), values.squeeze(1), smallest, widened)
        if n_full * 2 * width > batch * MOST * k:
            raise UserError(
                f"the rows of a batch have far more active latents than the {k} that sae.k asks for (more than {MOST} "
                "times as many would have to be held); use a lower train.lr, or a kind whose latents are counted"
            )
        again = torch.zeros_like(every, dtype=torch.bool).index_fill_(0, full, True)
        settled = _of(settled, ~again[settled.rows])
        width, widened = min(2 * width, len(latents)), widened + len(full)
        fresh = selected(full)


def _cut(
    mesh: Mesh, blocks: Sequence[_Block], position: Callable[[Tensor, Tensor], Tensor], *, count: int, bits: int
) -> _Cut:
    """The cut below the `count` largest keys; all positive ones are above it where there are fewer."""
    keys = [_keys(block).flatten() for block in blocks]
    found = _nth_largest(mesh, keys, bits=VALUE_BITS, n=count)
    if found is None:
        return _Cut(None, None)
    if found.equal == found.wanted:
        return _Cut(found.key, None)
    last = (1 << bits) - 1  # ties by the lower position: the largest of last - position
    tied = []
    for block in blocks:
        row, place = (_keys(block) == found.key).nonzero(as_tuple=True)
        tied.append(last - position(block.rows[row], block.selected.indices[row, place]))
    nth = _nth_largest(mesh, tied, bits=bits, n=found.wanted)
    assert nth is not None
    return _Cut(found.key, last - nth.key)


class _Nth(NamedTuple):
    """The n-th largest key of all ranks, how many keys equal it, and how many of those are among the n."""

    key: int
    equal: int
    wanted: int


def _nth_largest(mesh: Mesh, keys: Sequence[Int[Tensor, " _"]], *, bits: int, n: int) -> _Nth | None:
    """The n-th largest positive key of all ranks, or the smallest where there are fewer; None where there is none.

    Keys have `bits` bits; a key of 0 is no key. The number of positive keys is exchanged with every digit.
    """
    prefix, low, equal = 0, bits, 0
    positive = torch.stack([part.count_nonzero() for part in keys]).sum()[None]
    while low:
        digit = min(DIGIT, low)
        low -= digit
        counts = torch.stack([torch.bincount(part >> low, minlength=1 << DIGIT) for part in keys]).sum(0)
        *found, all_positive = sum_counts(mesh, mesh.world, torch.cat([counts, positive]), name=NAME).tolist()
        if (n := min(n, all_positive)) == 0:
            return None
        here = (1 << digit) - 1
        while n > found[here]:
            n, here = n - found[here], here - 1
        prefix, equal = prefix << digit | here, found[here]
        keys = [part[part >> low == here] & ((1 << low) - 1) for part in keys]
    return _Nth(prefix, equal, n)


def _keys(block: _Block) -> Int[Tensor, "some width"]:
    return block.selected.values.view(torch.int32)


def _float(key: int) -> float:
    return struct.unpack("<f", struct.pack("<i", key))[0]


def _pairs(blocks: Sequence[_Block], masks: Sequence[Tensor]) -> _Block:
    """The chosen pairs of all blocks, sorted by row."""
    row, values, indices = [], [], []
    for block, mask in zip(blocks, masks, strict=True):
        at, place = mask.nonzero(as_tuple=True)
        row.append(block.rows[at])
        values.append(block.selected.values[at, place])
        indices.append(block.selected.indices[at, place])
    rows, pairs = torch.cat(row), Selected(torch.cat(values)[:, None], torch.cat(indices)[:, None])
    if not len(blocks[0].rows):
        return _Block(rows, pairs)
    rows, order = rows.sort(stable=True)  # a row's pairs are in one block, and there in their order
    return _Block(rows, Selected(pairs.values[order], pairs.indices[order]))


def _of(block: _Block, kept: Bool[Tensor, " some"]) -> _Block:
    return _Block(block.rows[kept], Selected(block.selected.values[kept], block.selected.indices[kept]))
