"""Statistics and contexts of every latent on a stream of tokens, in one pass and bounded memory.

The result does not depend on the batches: sums run in the order of the rows, the rest is exact.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt, PositiveInt
from sae_kernels import Active
from torch import Tensor

from sae_dist.config import frozen
from sae_dist.interpret import histogram
from sae_dist.interpret.bounded_lists import BoundedLists, empty_lists, insert_, merge_cells
from sae_dist.interpret.token_hash import mix, token_hash, unsigned

SAMPLE_BINS = histogram.N_BINS // 2  # samples are kept by these; intervals are whole numbers of them
UNLABELLED = "unlabelled"

# x [rows, d_model], doc [rows], pos [rows]
RowBatches = Iterable[tuple[Tensor, Tensor | np.ndarray, Tensor | np.ndarray]]
Encode = Callable[[Float[Tensor, "rows d_model"]], Active]


@frozen
class PagesConfig:
    """What the feature pages show."""

    tokens: PositiveInt = 500_000  # read from the activation store
    top_contexts: PositiveInt = 16  # the strongest activations of each latent, one a passage
    intervals: PositiveInt = 5  # equal parts of a latent's range of activation
    interval_contexts: NonNegativeInt = 3  # chance contexts of each interval
    tokens_before: NonNegativeInt = 28  # of the token that a context is shown for
    tokens_after: NonNegativeInt = 14
    logits: PositiveInt = 10  # promoted, and as many suppressed, output tokens
    similar: PositiveInt = 8  # latents with the nearest decoder directions
    max_latents: PositiveInt = 8192  # that get a page of their own; a dictionary with more shows a sample by `seed`
    seed: NonNegativeInt = 0  # of every sample


class Collected(NamedTuple):
    """Statistics of all latents, and the evidence of those that get a page."""

    rows: int
    firings: Int[Tensor, " n_latents"]  # rows on which the latent is active
    total: Float[Tensor, " n_latents"]  # sum of its activations, float64
    maximum: Float[Tensor, " n_latents"]
    exponent: Int[Tensor, " n_latents"]  # the histogram runs from 0 to 2^exponent
    histogram: Int[Tensor, "n_latents n_bins"]
    categories: tuple[str, ...]  # sorted; empty when no document has one
    category_rows: Int[Tensor, " n_categories"]
    category_count: Int[Tensor, "n_latents n_categories"]
    category_total: Float[Tensor, "n_latents n_categories"]
    paged: Int[Tensor, " n_paged"]  # ascending ids of the latents that get a page
    top: BoundedLists  # cell i: the strongest activations of latent paged[i]
    samples: BoundedLists  # cell i * SAMPLE_BINS + b: chance activations from that part of its range


def paged_latents(n_latents: int, config: PagesConfig) -> Int[Tensor, " n_paged"]:
    """The latents that get a page: all, or `max_latents` by keyed hash, so that what they show is a fair sample."""
    latents = torch.arange(n_latents)
    if n_latents <= config.max_latents:
        return latents
    hashes = token_hash(latents, torch.zeros_like(latents), seed=config.seed)
    return hashes.argsort()[: config.max_latents].sort().values


def slots(paged: Int[Tensor, " n_paged"], n_latents: int) -> Int[Tensor, " n_latents"]:
    """The place of every latent in `paged`, -1 for those that are not there."""
    return torch.full((n_latents,), -1).index_copy(0, paged, torch.arange(len(paged)))


def first_tokens(rows: RowBatches, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The first `tokens` rows of a stream, documents and positions as int64."""
    for x, doc, pos in rows:
        n = min(len(x), tokens)
        yield x[:n], _int64(doc)[:n], _int64(pos)[:n]
        tokens -= n
        if tokens == 0:
            return


def _int64(ids: Tensor | np.ndarray) -> Int[Tensor, " rows"]:
    """Ids as int64; a uint64 keeps its bits."""
    ids = torch.as_tensor(ids).cpu()
    return ids.view(torch.int64) if ids.dtype == torch.uint64 else ids.to(torch.int64)


def document_id(doc: int) -> int:
    """The unsigned id of a document that int64 holds."""
    return doc & ((1 << 64) - 1)


@torch.no_grad()
def active_entries(
    encode: Encode, x: Float[Tensor, "rows d_model"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Row, latent and value of every activation above zero, by row."""
    active = encode(x)
    row, latent, value = active.rows.cpu(), active.indices.cpu(), active.values.float().cpu()
    above = value > 0  # a latent may have a sign (`abs_topk`): it is described by its positive side
    return row[above], latent[above], value[above]


def collect(
    rows: RowBatches,
    encode: Encode,
    *,
    n_latents: int,
    category: Callable[[int], str | None],
    config: PagesConfig,
    first: int = 0,
) -> Collected:
    """Statistics, histograms, strongest and sampled contexts and categories of all latents, in one pass.

    `first` is the number that the first latent has in the dictionary, where the others are left out: it is drawn alike.
    """
    paged = paged_latents(n_latents, config)
    slot_of = slots(paged, n_latents)
    count = torch.zeros(n_latents, dtype=torch.int64)
    total = torch.zeros(n_latents, dtype=torch.float64)
    maximum = torch.zeros(n_latents)
    exponent = torch.full((n_latents,), histogram.UNSEEN)
    counts = torch.zeros(n_latents, histogram.N_BINS, dtype=torch.int64)
    top = empty_lists(len(paged), 2 * config.top_contexts)
    samples = empty_lists(len(paged) * SAMPLE_BINS, max(1, 2 * config.interval_contexts))  # some are shown already
    categories = _Categories(n_latents)
    block = config.tokens_before + 1 + config.tokens_after
    n_rows = 0
    for x, doc, pos in first_tokens(rows, config.tokens):
        n_rows += len(x)
        row, latent, value = active_entries(encode, x)
        count += latent.bincount(minlength=n_latents)
        total.index_add_(0, latent, value.double())
        maximum.scatter_reduce_(0, latent, value, "amax")
        _widen_(exponent, counts, samples, paged, grown=histogram.exponents(maximum))
        bin_ = histogram.bins(value, exponent[latent])
        counts.view(-1).add_((latent * histogram.N_BINS + bin_).bincount(minlength=counts.numel()))
        categories.add_(doc, row, latent, value, category)

        shown = (slot_of[latent] >= 0).nonzero().squeeze(-1)
        row, latent, value, bin_ = row[shown], latent[shown], value[shown], bin_[shown]
        slot, hashes, doc, pos = slot_of[latent], token_hash(doc, pos, seed=config.seed)[row], doc[row], pos[row]
        strength = (value.view(torch.int32).long() << 32) | unsigned(hashes) >> 31  # positive floats sort as integers
        insert_(top, slot, key=~strength, value=value, doc=doc, pos=pos, block=block)
        if config.interval_contexts:
            cell = slot * SAMPLE_BINS + bin_ // (histogram.N_BINS // SAMPLE_BINS)
            insert_(samples, cell, key=unsigned(mix(hashes + latent + first)), value=value, doc=doc, pos=pos)
    return Collected(
        n_rows, count, total, maximum, exponent, counts, *categories.sorted(), paged=paged, top=top, samples=samples
    )


def _widen_(
    exponent: Int[Tensor, " n_latents"],
    counts: Int[Tensor, "n_latents n_bins"],
    samples: BoundedLists,
    paged: Int[Tensor, " n_paged"],
    *,
    grown: Int[Tensor, " n_latents"],
) -> None:
    """Moves the histogram and samples of every latent whose range has `grown` to the new range."""
    shift = torch.where(exponent == histogram.UNSEEN, 0, grown - exponent)
    for s in shift.unique().tolist():
        if s == 0:
            continue
        histogram.widen_(counts, (shift == s).nonzero().squeeze(-1), shift=s)
        slots = (shift[paged] == s).nonzero().squeeze(-1)
        cells = slots[:, None] * SAMPLE_BINS + torch.arange(SAMPLE_BINS)
        old = histogram.merged(SAMPLE_BINS, s)
        groups = (slots[:, None, None] * SAMPLE_BINS + old).where(old >= 0, -1)
        for column, new in zip(samples, merge_cells(samples, groups.flatten(0, 1)), strict=True):
            column[cells.flatten()] = new
    exponent.copy_(grown)


class _Categories:
    """Firings by the category of the document; categories are numbered as they come and sorted at the end."""

    def __init__(self, n_latents: int) -> None:
        self.number: dict[str | None, int] = {}
        self.of_doc: dict[int, int] = {}
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.count = torch.zeros(n_latents, 0, dtype=torch.int64)
        self.total = torch.zeros(n_latents, 0, dtype=torch.float64)

    def add_(self, doc: Tensor, row: Tensor, latent: Tensor, value: Tensor, category: Callable[[int], str | None]):
        docs, position = doc.unique(return_inverse=True)
        for d in docs.tolist():
            if d not in self.of_doc:
                self.of_doc[d] = self.number.setdefault(category(document_id(d)), len(self.number))
        number = torch.tensor([self.of_doc[d] for d in docs.tolist()], dtype=torch.int64)[position]
        n_latents, known = self.count.shape
        if (new := len(self.number) - known) > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(new)])
            self.count = torch.cat([self.count, self.count.new_zeros(n_latents, new)], dim=1)
            self.total = torch.cat([self.total, self.total.new_zeros(n_latents, new)], dim=1)
        self.rows += number.bincount(minlength=len(self.rows))
        place = latent * len(self.rows) + number[row]
        self.count.view(-1).index_add_(0, place, torch.ones_like(place))
        self.total.view(-1).index_add_(0, place, value.double())

    def sorted(self) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
        names = [UNLABELLED if name is None else name for name in self.number]
        order = sorted(range(len(names)), key=names.__getitem__) if set(self.number) != {None} else []
        return tuple(names[i] for i in order), self.rows[order], self.count[:, order], self.total[:, order]
