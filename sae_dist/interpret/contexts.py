"""Which contexts of a latent are shown, and the activations of their neighbouring tokens (a second pass)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_dist.interpret.bounded_lists import EMPTY, BoundedLists, merge_cells
from sae_dist.interpret.collect import (
    SAMPLE_BINS,
    Collected,
    Encode,
    PagesConfig,
    RowBatches,
    active_entries,
    first_tokens,
)
from sae_dist.interpret.histogram import N_BINS

TOP = -1


class Intervals(NamedTuple):
    """Each paged latent's range of activation, cut into parts that are equal to within 1/16 of the range."""

    edges: Float[Tensor, "n_paged n_edges"]  # the last one is the maximum
    firings: Int[Tensor, "n_paged n_intervals"]


class Contexts(NamedTuple):
    """Tokens at which a latent is shown, by latent, then interval (TOP, then the strongest first), then value."""

    slot: Int[Tensor, " n"]  # index into Collected.paged
    interval: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    doc: Int[Tensor, " n"]
    pos: Int[Tensor, " n"]


class Shading(NamedTuple):
    """Activations round every context; those of context i are [start[i], start[i + 1])."""

    start: Int[Tensor, " n_plus_one"]
    offset: Int[Tensor, " m"]  # position less the context's
    value: Float[Tensor, " m"]


def choose(collected: Collected, config: PagesConfig) -> tuple[Contexts, Intervals]:
    """The strongest activations, one a passage, and a uniform sample of every interval without those already shown."""
    edges = _bin_edges(collected, config.intervals)
    top = _passages(collected.top, config)
    parts = [_contexts(top, TOP)]
    if config.interval_contexts:
        parts += [_contexts(_unseen(sample, top, config), q) for q, sample in enumerate(_samples(collected, edges))]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = _lexsort(columns[0], torch.where(columns[1] == TOP, config.intervals, columns[1]).neg(), columns[2].neg())
    return Contexts(*(column[order] for column in columns)), _intervals(collected, edges)


def _bin_edges(collected: Collected, intervals: int) -> Int[Tensor, "n_paged n_edges"]:
    """Edges in sample bins: the bins in use, divided as evenly as whole bins can be."""
    latents = collected.paged
    used = (collected.histogram[latents] > 0).long() * torch.arange(1, N_BINS + 1)
    used = -(-used.amax(-1) // (N_BINS // SAMPLE_BINS))
    return (torch.arange(intervals + 1) * used[:, None] + intervals // 2) // intervals


def _intervals(collected: Collected, edges: Int[Tensor, "n_paged n_edges"]) -> Intervals:
    latents = collected.paged
    below = torch.nn.functional.pad(collected.histogram[latents].cumsum(-1), (1, 0))
    count = below.gather(1, edges * (N_BINS // SAMPLE_BINS)).diff(dim=-1)
    values = torch.ldexp(edges / SAMPLE_BINS, collected.exponent[latents, None].clamp(min=-126).float())
    values[:, -1] = collected.maximum[latents]
    return Intervals(values, count)


def _samples(collected: Collected, edges: Int[Tensor, "n_paged n_edges"]) -> list[BoundedLists]:
    """A uniform sample of every interval; the smallest hashes of a union of bins are among those of the bins."""
    bins = torch.arange(SAMPLE_BINS)
    cells = torch.arange(len(edges))[:, None] * SAMPLE_BINS + bins
    return [
        merge_cells(collected.samples, cells.where((low[:, None] <= bins) & (bins < high[:, None]), -1))
        for low, high in zip(edges[:, :-1].unbind(1), edges[:, 1:].unbind(1), strict=True)
    ]


def _passages(top: BoundedLists, config: PagesConfig) -> BoundedLists:
    """The strongest first, without activations that an earlier context already shows."""
    chosen = torch.zeros(top.key.shape, dtype=torch.bool)
    for i in range(top.key.shape[1]):
        seen = _shows(top.doc, top.pos, top.doc[:, i, None], top.pos[:, i, None], config)
        room = chosen.sum(-1) < config.top_contexts
        chosen[:, i] = (top.key[:, i] != EMPTY) & ~(seen & chosen).any(-1) & room
    return top._replace(key=top.key.masked_fill(~chosen, EMPTY))


def _unseen(sample: BoundedLists, shown: BoundedLists, config: PagesConfig) -> BoundedLists:
    """The first `interval_contexts` of a sample that no shown context has in its window."""
    in_sight = torch.stack(
        [
            (_shows(shown.doc, shown.pos, doc[:, None], pos[:, None], config) & (shown.key != EMPTY)).any(-1)
            for doc, pos in zip(sample.doc.unbind(1), sample.pos.unbind(1), strict=True)
        ],
        dim=1,
    )
    free = ~in_sight & (sample.key != EMPTY)
    chosen = free & (free.cumsum(-1) <= config.interval_contexts)
    return sample._replace(key=sample.key.masked_fill(~chosen, EMPTY))


def _shows(doc: Tensor, pos: Tensor, other_doc: Tensor, other_pos: Tensor, config: PagesConfig) -> Bool[Tensor, "..."]:
    """Whether the window round (doc, pos) holds the other token."""
    ahead = other_pos - pos
    return (doc == other_doc) & (-config.tokens_before <= ahead) & (ahead <= config.tokens_after)


def _contexts(kept: BoundedLists, interval: int) -> Contexts:
    slot, place = (kept.key != EMPTY).nonzero(as_tuple=True)
    value, doc, pos = (column[slot, place] for column in kept[1:])
    return Contexts(slot, torch.full_like(slot, interval), value, doc, pos)


def _lexsort(*columns: Tensor) -> Int[Tensor, " n"]:
    """The order that sorts by the first column, then by the second, ...; stable."""
    order = torch.arange(len(columns[0]))
    for column in reversed(columns):
        order = order[column[order].argsort(stable=True)]
    return order


class _Windows(NamedTuple):
    """Windows of equal width as sorted words (group, first position)."""

    groups: Int[Tensor, " g"]  # ascending, distinct
    start: Int[Tensor, " w"]  # group's number << 32 | first position
    width: int


def _windows(group: Int[Tensor, " n"], first: Int[Tensor, " n"], width: int) -> _Windows:
    groups, number = group.unique(return_inverse=True)
    return _Windows(groups, ((number << 32) | first).unique(), width)


def _places(windows: _Windows, group: Int[Tensor, " n"], pos: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The word of every (group, position), -1 outside all windows."""
    number = torch.searchsorted(windows.groups, group).clamp(max=len(windows.groups) - 1)
    place = (number << 32) | pos
    last = windows.start[(torch.searchsorted(windows.start, place, right=True) - 1).clamp(min=0)]
    inside: Bool[Tensor, " n"] = (windows.groups[number] == group) & (last <= place) & (place < last + windows.width)
    return place.where(inside, -1)


def shade(
    rows: RowBatches, encode: Encode, *, collected: Collected, contexts: Contexts, config: PagesConfig
) -> Shading:
    """The activations of each context's latent on the tokens around it, from the same rows in a second pass.

    Encodes only rows that some context shows. Tokens that are not in the stream have no value.
    """
    width = config.tokens_before + 1 + config.tokens_after
    first = contexts.pos - config.tokens_before + width  # positions are moved up by `width`: no window starts below 0
    docs = contexts.doc.unique()
    in_docs = _windows(contexts.doc, first, width)
    slot_of = torch.full((len(collected.firings),), -1).index_copy(
        0, collected.paged, torch.arange(len(collected.paged))
    )
    pair = contexts.slot * len(docs) + torch.searchsorted(docs, contexts.doc)
    in_pairs = _windows(pair, first, width)
    found: list[tuple[Tensor, Tensor]] = []
    for x, doc, pos in first_tokens(rows, config.tokens) if len(docs) else ():
        needed = (_places(in_docs, doc, pos + width) >= 0).nonzero().squeeze(-1)
        if not len(needed):
            continue
        row, latent, value = active_entries(encode, x[needed.to(x.device)])
        slot, at = slot_of[latent], needed[row]
        place = _places(in_pairs, slot * len(docs) + torch.searchsorted(docs, doc[at]), pos[at] + width)
        hit = ((place >= 0) & (slot >= 0)).nonzero().squeeze(-1)
        found.append((place[hit], value[hit]))
    empty = torch.zeros(0, dtype=torch.int64)
    place, order = torch.cat([empty, *(p for p, _ in found)]).sort()
    value = torch.cat([torch.zeros(0), *(v for _, v in found)])[order]
    begin = (torch.searchsorted(in_pairs.groups, pair) << 32) | first
    low, high = torch.searchsorted(place, begin), torch.searchsorted(place, begin + width)
    start = torch.nn.functional.pad((high - low).cumsum(0), (1, 0))
    of = torch.repeat_interleave(torch.arange(len(begin)), high - low)
    member = torch.arange(int(start[-1])) - start[of] + low[of]
    return Shading(start, place[member] - begin[of] - config.tokens_before, value[member])
