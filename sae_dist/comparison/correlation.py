"""Pearson's r of latents of one dictionary with those of another, exactly and some latents at a time.

sum f_a f_b is taken over the rows on which both are active, which are few; the rest follows from sums of each alone:
r = (mean(f_a f_b) - mean(f_a) mean(f_b)) / (std(f_a) std(f_b)). All sums are fp64, in the order of the rows. Neurons
are active on most rows: those of `b` are then laid out densely, some rows at a time.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.comparison.activations import Activations, Entries

NONE = -2.0  # instead of an r or a cosine that is not defined: below all others
CELLS = 1 << 22  # of a block [latents, n_latents of the other]: 32 MiB of fp64
PAIRS = 1 << 21  # of activations on the same row, at once
DENSE = 1 / 8  # share of the activations that are not 0 from which on dense rows are faster


def blocks(n: int, other: int) -> list[range]:
    """All latents, as many at a time as a block against `other` latents has room for."""
    size = max(1, CELLS // max(other, 1))
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def correlation(
    a: Activations, b: Activations, latents: range, order: Int[np.ndarray, " rows"] | None = None
) -> Float[Tensor, "latents n_b"]:
    """r of each of these latents of `a` with every latent of `b`; NONE where one of the two does not vary.

    With `order`, row t of `a` meets row order[t] of `b`.
    """
    here = slice(latents.start, latents.stop)
    r = pair_sums(a, b, latents, order).addr_(a.mean[here], b.mean, beta=1 / max(a.rows, 1), alpha=-1)
    r.div_(a.std[here, None]).div_(b.std).clamp_(-1, 1)
    r[a.std[here] == 0] = NONE
    r[:, b.std == 0] = NONE
    return r


def pair_sums(
    a: Activations, b: Activations, latents: range, order: Int[np.ndarray, " rows"] | None = None, *,
    count: bool = False,
) -> Float[Tensor, "latents n_b"]:  # fmt: skip
    """sum f_a f_b over the rows on which both are active, fp64; with `count`, how many those rows are."""
    sums = torch.zeros(len(latents), b.n_latents, dtype=torch.float64)
    dense = len(b.latent) >= DENSE * b.rows * b.n_latents
    for entries in a.of_latents(latents):
        own = entries._replace(latent=entries.latent.astype(np.int64) - latents.start)
        (_add_dense if dense else _add_pairs)(sums, own, b, order, count)
    return sums


def _add_pairs(
    sums: Float[Tensor, "latents n_b"], entries: Entries, b: Activations, order: np.ndarray | None, count: bool
) -> None:
    """A product for each activation of these entries and each of `b` on its row."""
    rows = entries.row if order is None else order[entries.row]
    begin = b.offsets[rows]
    lengths = b.offsets[rows + 1] - begin
    for some in _pieces(lengths):
        at = _ranges(begin[some], lengths[some])
        place = np.repeat(entries.latent[some] * b.n_latents, lengths[some]) + b.latent[at]
        sums.view(-1).index_add_(0, torch.from_numpy(place), _products(entries, some, lengths, b.value, at, count))


def _add_dense(
    sums: Float[Tensor, "latents n_b"], entries: Entries, b: Activations, order: np.ndarray | None, count: bool
) -> None:
    """A sparse matrix of these entries times dense rows of `b`, as many at a time as a block has room for."""
    step = max(1, CELLS // b.n_latents)
    for first in range(int(entries.row.min()), int(entries.row.max()) + 1, step):
        own = Entries(*(column[(first <= entries.row) & (entries.row < first + step)] for column in entries))
        rows = np.arange(first, min(first + step, b.rows))
        dense = _dense(b, rows if order is None else order[rows], count)
        at = torch.from_numpy(np.stack([own.latent, own.row.astype(np.int64) - first]))
        value = torch.ones(len(own.row), dtype=torch.float64) if count else torch.from_numpy(own.value).double()
        sums += torch.sparse_coo_tensor(at, value, (len(sums), len(rows)), check_invariants=False) @ dense


def _dense(b: Activations, rows: Int[np.ndarray, " some"], count: bool) -> Float[Tensor, "some n_b"]:
    """Activations on these rows, fp64; with `count`, 1 where there is one."""
    begin = b.offsets[rows]
    lengths = b.offsets[rows + 1] - begin
    at = _ranges(begin, lengths)
    dense = np.zeros((len(rows), b.n_latents))
    dense[np.repeat(np.arange(len(rows)), lengths), b.latent[at]] = 1 if count else b.value[at]
    return torch.from_numpy(dense)


def _products(
    entries: Entries, some: slice, lengths: np.ndarray, value: np.ndarray, at: np.ndarray, count: bool
) -> Tensor:
    if count:
        return torch.ones(len(at), dtype=torch.float64)
    return torch.from_numpy(np.repeat(entries.value[some].astype(np.float64), lengths[some]) * value[at])


def _pieces(lengths: Int[np.ndarray, " n"]) -> Iterator[slice]:
    """Neighbours whose lengths sum to about `PAIRS`."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + PAIRS, side="right")))
        yield slice(first, last)
        first = last


def _ranges(begin: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """begin[0], begin[0] + 1, ... of each, one after the other."""
    shift = begin - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(lengths.sum())
