"""Two kinds of text, one pass over both: their difference in means, and the latents that tell them apart.

A document is one observation: tokens of a document are alike, and counted singly they would make chance look certain.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from sae_kernels import Active
from torch import Tensor

from sae_dist.config import UserError

AWAY, TOWARD, NEITHER = 0, 1, -1  # sides
_CHUNK = 4 << 20  # numbers of [latents, documents] alive at once

# x [rows, d_in] that is read, y [rows, d_out] that is rebuilt, doc [rows], side [rows]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Contrast(NamedTuple):
    """Means of rows on each side, and how active each latent is in each document."""

    means: Float[Tensor, "2 d_out"]  # of AWAY and of TOWARD
    rows: Int[Tensor, " 2"]
    side: Int[Tensor, " n_documents"]
    length: Int[Tensor, " n_documents"]  # rows
    document: Int[Tensor, " n"]  # of each pair (document, latent) that is active, sorted by latent
    latent: Int[Tensor, " n"]
    total: Float[Tensor, " n"]  # its activation in the document
    n_latents: int

    @property
    def difference_in_means(self) -> Float[Tensor, " d_out"]:
        return self.means[TOWARD] - self.means[AWAY]


class Told(NamedTuple):
    """How well every latent alone tells documents of the two sides apart, by its mean activation in each."""

    auc: Float[Tensor, " n_latents"]  # chance that a document of TOWARD has more of it than one of AWAY; ties: half
    p: Float[Tensor, " n_latents"]  # Mann-Whitney, two-sided, normal approximation with ties; 1 where it is silent
    q: Float[Tensor, " n_latents"]  # Benjamini-Hochberg over the latents that are active: the false discovery rate
    tested: int
    toward: Float[Tensor, " n_latents"]  # mean over tokens
    away: Float[Tensor, " n_latents"]
    share: Float[Tensor, " n_latents"]  # of the difference in means; they sum to 1 less what no latent explains

    def best(self, n: int, *, q: float = 0.05) -> list[int]:
        """At most `n` latents that stand for TOWARD at this false discovery rate, by their share of the difference."""
        score = torch.where((self.q <= q) & (self.auc > 0.5), self.share, -1.0)
        order = score.argsort(descending=True, stable=True)[:n]
        return [int(latent) for latent in order if score[latent] > 0]


@torch.no_grad()
def contrast(batches: Iterable[Batch], encode: Callable[[Tensor], Active], *, n_latents: int) -> Contrast:
    """Both in one pass; UserError where a side has no row."""
    number: dict[int, int] = {}
    sides: list[int] = []
    lengths: list[int] = []
    sums, counts = torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)
    keys, totals = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    for x, y, doc, side in batches:
        kept = (side != NEITHER).nonzero().squeeze(-1)
        if not len(kept):
            continue
        x, y, doc, side = x[kept], y[kept].double().cpu(), doc[kept], side[kept]
        sums = sums if sums.shape[1] else torch.zeros(2, y.shape[1], dtype=torch.float64)
        sums.index_add_(0, side, y)
        counts += side.bincount(minlength=2)
        own, place, length = doc.unique(return_inverse=True, return_counts=True)
        first = torch.zeros(len(own), dtype=torch.int64).index_copy(0, place.flip(0), side.flip(0))
        for one, its_side, rows in zip(own.tolist(), first.tolist(), length.tolist(), strict=True):
            at = number.setdefault(one, len(number))
            if at == len(sides):
                sides.append(its_side)
                lengths.append(0)
            lengths[at] += rows
        numbers = torch.tensor([number[one] for one in own.tolist()])[place]
        active = encode(x)
        new = active.indices.cpu() * (1 << 32) + numbers[active.rows.cpu()]
        keys, totals = _summed(torch.cat([keys, new]), torch.cat([totals, active.values.double().cpu()]))
    for name, count in zip(("away", "toward"), counts.tolist(), strict=True):
        if not count:
            raise UserError(f"{name}: no token of that kind was found; give more tokens, or other text")
    return Contrast(
        (sums / counts[:, None]).float(), counts, torch.tensor(sides), torch.tensor(lengths),
        keys & ((1 << 32) - 1), keys >> 32, totals.float(), n_latents,
    )  # fmt: skip


def _summed(keys: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    once, place = keys.unique(return_inverse=True)
    return once, values.new_zeros(len(once)).index_add_(0, place, values)


def tell_apart(found: Contrast, W_dec: Float[Tensor, "n_latents d_out"]) -> Told:
    """Tests every latent that is active at all; documents need not be equally long."""
    n, n_docs = found.n_latents, len(found.side)
    auc, p = torch.full((n,), 0.5), torch.ones(n, dtype=torch.float64)
    mean = found.total / found.length[found.document]
    alive = found.latent.unique()
    for part in alive.split(max(1, _CHUNK // n_docs)):
        low, high = (int(torch.searchsorted(found.latent, end)) for end in (part[0], part[-1] + 1))
        dense = torch.zeros(len(part), n_docs)
        dense[torch.searchsorted(part, found.latent[low:high]), found.document[low:high]] = mean[low:high]
        auc[part], p[part] = _mann_whitney(dense, found.side == TOWARD)
    q = torch.ones(n, dtype=torch.float64)
    q[alive] = false_discovery_rates(p[alive])
    toward, away = (
        torch.zeros(n).index_add_(0, found.latent[here], found.total[here]) / found.rows[side]
        for side in (TOWARD, AWAY)
        for here in [found.side[found.document] == side]
    )
    difference = found.difference_in_means
    share = (toward - away) * (W_dec.cpu() @ difference) / difference.square().sum()
    return Told(auc, p, q, len(alive), toward, away, share)


def _mann_whitney(
    values: Float[Tensor, "latents documents"], toward: Tensor
) -> tuple[Float[Tensor, " latents"], Float[Tensor, " latents"]]:
    ordered = values.sort(dim=1).values.contiguous()
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    ranks = (below + up_to + 1).double() / 2
    n, n_toward = values.shape[1], int(toward.sum())
    pairs = n_toward * (n - n_toward)
    wins = ranks[:, toward].sum(1) - n_toward * (n_toward + 1) / 2
    ties = ((up_to - below).double().square() - 1).sum(1)  # a tie of t documents adds t^3 - t
    variance = pairs / 12 * (n + 1 - ties / max(1, n * (n - 1)))
    z = (wins - pairs / 2) / variance.clamp_min(1e-12).sqrt()
    return (wins / pairs).float(), torch.erfc(z.abs() / math.sqrt(2)).where(variance > 1e-9, 1.0)


def false_discovery_rates(p: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Benjamini and Hochberg's: the least rate at which each would be found."""
    order = p.argsort(descending=True)
    share = len(p) / torch.arange(len(p), 0, -1, dtype=torch.float64)
    q = torch.empty_like(p)
    q[order] = (p[order] * share).cummin(0).values.clamp_max(1)
    return q
