"""How latents of one dictionary feed those of another that reads the same residual stream further on.

What is in the stream stays there: at the same token, latent i of the earlier dictionary moves the pre-activation of
latent j of the later one by f_i V_ij, whatever the layers between add. V_ij = W_dec[i] . W_enc[:, j] is a virtual
weight (Elhage et al. 2021). Most of them join latents that are never active together, so that rows are counted, too:

    supply_ij = V_ij sum_t f_j (f_i - mean f_i) / sum_t |f_j|

is the target-weighted expected residual attribution of Ameisen et al. (2025), less what i supplies on the mean row.
Summed over all i it is what the earlier latents together supply, which is measured on the rows as well.
"""

import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from sae_kernels import Active, active_decode
from torch import Tensor

from sae_dist.comparison import tables
from sae_dist.comparison.activations import Activations
from sae_dist.comparison.correlation import blocks, pair_sums
from sae_dist.comparison.figures import Figures, distribution
from sae_dist.progress import logged
from sae_dist.sae.dictionary import Dictionary

PAIRS = 1 << 13  # of activations whose encoder rows are gathered at once
TINY = torch.finfo(torch.float64).tiny

_STREAM = re.compile(r"(resid_pre|attn_out|mlp_out|resid_post)\.(\d+)")


def feeds(writes: str, reads: str) -> bool:
    """Whether what is at the hook point `writes` is in the stream at `reads`, further on."""
    earlier, later = _STREAM.fullmatch(writes), _STREAM.fullmatch(reads)
    if earlier is None or later is None or not later[1].startswith("resid"):
        return False
    before, after = (int(at[2]) + (at[1] != "resid_pre") for at in (earlier, later))  # layers that have run
    return before < after or (before == after and not earlier[1].startswith("resid"))


class Supplied(NamedTuple):
    """By how much a pre-activation of the later dictionary is above its mean where the latent is active.

    The mean over rows, weighted by the size of the latent's value. NaN where it never fires.
    """

    rise: Float[Tensor, " n_later"]
    carried: Float[Tensor, " n_later"]  # of this, what is there at the earlier hook point
    by_latents: Float[Tensor, " n_later"]  # of this, what the latents of the earlier dictionary supply


class Inputs(NamedTuple):
    """The earlier latents that feed each later one; -1 and NaN where there are fewer."""

    raised_by: Int[Tensor, "n_later kept"]  # those that supply most
    supply: Float[Tensor, "n_later kept"]
    weight: Float[Tensor, "n_later kept"]
    lowered_by: Int[Tensor, "n_later kept"]  # those that take most
    lowered_supply: Float[Tensor, "n_later kept"]
    lowered_weight: Float[Tensor, "n_later kept"]
    heaviest: Int[Tensor, " n_later"]  # of the largest virtual weight, among those that fire
    heaviest_weight: Float[Tensor, " n_later"]
    together: Bool[Tensor, " n_later"]  # whether that one is ever active with it


class Stream:
    """Sums over the rows of an earlier and a later dictionary."""

    def __init__(self, earlier: Dictionary, later: Dictionary) -> None:
        self._W_dec, self._b_dec = earlier.parameters.W_dec, earlier.parameters.b_dec
        self._W_enc = later.parameters.W_enc.T  # [n_later, width]
        n, width = self._W_enc.shape
        self._weighted = torch.zeros(n, 3, dtype=torch.float64)
        self._values, self._sizes = torch.zeros(2, n, dtype=torch.float64)
        self._total, self._shift, self._rows = torch.zeros(3, width, dtype=torch.float64), torch.zeros(3, width), 0

    def add(
        self, later: Float[Tensor, "rows width"], earlier: Float[Tensor, "rows width"], active: tuple[Active, Active]
    ) -> None:
        """The stream at both hook points, and the active latents of the earlier and the later dictionary."""
        x = torch.stack([later, earlier, active_decode(active[0], self._W_dec, self._b_dec)])
        if not self._rows:
            self._shift = x.mean(1)  # sums of what is near 0 lose less to rounding
        x -= self._shift[:, None]
        self._total += x.sum(1, dtype=torch.float64)
        self._rows += len(later)
        latents, values, rows = active[1].indices, active[1].values.double(), active[1].rows
        self._values.index_add_(0, latents, values)
        self._sizes.index_add_(0, latents, values.abs())
        for first in range(0, len(rows), PAIRS):
            some = slice(first, first + PAIRS)
            dots = (x[:, rows[some]] * self._W_enc[latents[some]]).sum(2).T.double()
            self._weighted.index_add_(0, latents[some], values[some, None] * dots)

    def supplied(self) -> Supplied:
        usual = (self._W_enc @ (self._total / max(self._rows, 1)).float().T).double()
        above = (self._weighted - self._values[:, None] * usual) / self._sizes[:, None]
        return Supplied(*above.T)

    def inputs(
        self, earlier: Activations, later: Activations, *, kept: int,
        order: Int[np.ndarray, " rows"] | None = None, said: str = "virtual weights",
    ) -> Inputs:  # fmt: skip
        """After all rows. With `order`, row t of the later meets row order[t] of the earlier: what chance gives."""
        parts, found = blocks(later.n_latents, earlier.n_latents), list[Inputs]()
        for latents in logged(parts, said, len(parts), of=f"times {len(parts[0]):,} latents"):
            here = slice(latents.start, latents.stop)
            sums, weights = pair_sums(later, earlier, latents, order), self._W_enc[here] @ self._W_dec.T
            excess = sums - later.rows * torch.outer(later.mean[here], earlier.mean)
            supply = (excess * weights / self._sizes[here, None].clamp(min=TINY)).float()
            heaviest_weight, heaviest = weights.masked_fill(~earlier.fires, -torch.inf).max(1)
            together = sums.gather(1, heaviest[:, None])[:, 0] != 0
            each = *_most(supply, weights, kept), *_most(supply, weights, kept, sign=-1)
            found.append(Inputs(*each, heaviest, heaviest_weight, together))
        return Inputs(*map(torch.cat, zip(*found, strict=True)))


def _most(
    supply: Float[Tensor, "some n_earlier"], weights: Float[Tensor, "some n_earlier"], kept: int, *, sign: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, supply and weight of those whose supply has this sign, the largest first."""
    value, at = (sign * supply).topk(min(kept, supply.shape[1]), dim=1)
    there, weight = value > 0, weights.gather(1, at)
    return (
        torch.where(there, at, -1), torch.where(there, sign * value, torch.nan),
        torch.where(there, weight, torch.nan),
    )  # fmt: skip


def measure(
    stream: Stream, names: tuple[str, str], activations: tuple[Activations, Activations], *, kept: int, seed: int
) -> tuple[Figures, pa.Table]:
    """After all rows, of an earlier and a later dictionary: figures, and a row for each latent of the later."""
    earlier, later = activations
    order = np.random.default_rng(seed).permutation(later.rows)
    found = stream.inputs(earlier, later, kept=kept)
    chance = stream.inputs(earlier, later, kept=1, order=order, said="by chance: virtual weights")
    supplied, firings = stream.supplied(), later.firings
    own = {"earlier": names[0], "later": names[1]} | _figures(found, chance, supplied, firings)
    return own, tables.of_inputs(names, found._asdict(), supplied._asdict(), firings)


def _figures(found: Inputs, chance: Inputs, supplied: Supplied, firings: Int[Tensor, " n_later"]) -> Figures:
    """Shares of the rise: what the stream carries, what latents supply, and what the foremost of these does."""
    there = (firings > 0) & (supplied.rise > 0)

    def shares(of: Tensor) -> Figures:
        return distribution((of / supplied.rise).float(), firings, there=there)

    foremost = {name: shares(each.supply[:, 0].nan_to_num()) for name, each in (("found", found), ("chance", chance))}
    apart = ~found.together[firings > 0]
    return {
        "carried": shares(supplied.carried), "by_latents": shares(supplied.by_latents), "foremost": foremost,
        "heaviest_apart": float(apart.double().mean()) if len(apart) else None,
    }  # fmt: skip
