"""The count best latents of a whole batch, over all rows and parts: what one rank chooses, ties included (BatchTopK).

Every rank selects the `width` best of its own part for its own rows, and the world finds the smallest (value, row,
latent) that still is among the count best: the bits of non-negative floats order like integers, so it is found digit by
digit, by counts alone. A row whose last candidate is chosen may hide more: such rows are selected again twice as wide,
and the cut, which they can only raise, is made anew. So any width gives the exact choice, and a good one gives it at
once; a rank never holds more pairs than are chosen, beside candidates of 2 width places a row.

A cut takes 4 all-reduces of 257 counts and one of a single one, of which a rank of W receives 2 (W - 1) / W * 8 bytes
each; where values tie at the cut, one more of 257 for each 8 bits of batch * n_latents. Widening makes at most
log2(latents of a part / width) further cuts.
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
WIDTH = 4  # times k / parts candidates a row and part: few rows of a batch choose more
LEAST_WIDTH = 16
MOST = 64  # times k candidates a row that are held at once while rows are selected again, in the mean over the batch

SelectFunction = Callable[[Tensor, int], Selected]  # some rows, k -> the k best latents of this part for each


class BatchSelection(NamedTuple):
    """The pairs of the batch's best that are this rank's: its rows, its latents; by row, descending within one."""

    row: Int[Tensor, " pairs"]  # within this rank's rows
    latent: Int[Tensor, " pairs"]  # within this rank's part
    values: Float[Tensor, " pairs"]
    smallest: float | None  # chosen value of the whole batch; None: nothing is positive
    widened: int  # rows here that were selected again


class _Block(NamedTuple):
    """Candidates of some rows, descending; pairs that are settled are a block of width 1."""

    rows: Int[Tensor, " some"]
    selected: Selected


class _Cut(NamedTuple):
    """What is chosen: keys above `key`, and of those that equal it the ones at `last` and before."""

    key: int | None  # None: there is nothing to choose; 1 is the least positive value's
    last: int | None  # row * n_latents + latent, of the whole; None: all of them

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
    """How many of a row's best a part selects at first."""
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
    """Of all rows' and parts' positive values the batch * k largest, ties by row, then latent.

    Where they are not `counted` it is all of them, and k is how many are expected of a row, in the mean. `rows` are
    this rank's share of the batch, from `first_row` on, as `select` takes them, `at_once` at a time; its part is
    `latents` of `n_latents`. All ranks call it together, with `rows` and `latents` of their places in the mesh.
    UserError on all ranks where so many rows must be selected again that it would take memory without bound.
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
            smallest = None if cut.key is None else _float(cut.key)
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
    """Where the `count` best end; all positive ones are among them where there are fewer."""
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
    """The n-th largest of the world's keys: how many equal it, and how many of those are among the n."""

    key: int
    equal: int
    wanted: int


def _nth_largest(mesh: Mesh, keys: Sequence[Int[Tensor, " _"]], *, bits: int, n: int) -> _Nth | None:
    """Of all ranks' keys of so many bits the n-th largest positive one, or the smallest; None when there is none.

    A key of 0 is none: it comes last in its digit, and n never reaches it. The number of positive keys travels along.
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
    """The chosen pairs of all blocks, by row, as the fresh blocks are where nothing is settled yet."""
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
