"""What a larger dictionary adds: the FVU of a smaller one into which latents of the larger are stitched.

A latent of the larger is known where it has a parent in the smaller (splitting.py), else novel (Leask et al. 2025).

    smaller          as it is
    novel_added      and the novel latents of the larger
    swapped          parents replaced by the latents of the larger that belong to them
    stitched         both: all of the larger, and those of the smaller that nothing belongs to
    larger           as it is
    chance_added     as many latents of the larger as are novel, drawn by chance, added
    chance_swapped   parents replaced by as many latents of the larger as belong to them, drawn by chance
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_kernels import Active, active_decode
from torch import Tensor

from sae_dist.comparison.splitting import Splits
from sae_dist.evaluate.reconstruction import is_constant
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.metrics import ReconstructionSums, figures, sums, variance

PAIRS = 1 << 13  # of activations whose decoder rows are gathered at once


class Chosen(NamedTuple):
    """Latents of the larger dictionary, and of the smaller those to which some of these belong."""

    novel: Bool[Tensor, " n_larger"]
    known: Bool[Tensor, " n_larger"]
    parents: Bool[Tensor, " n_smaller"]
    chance_added: Bool[Tensor, " n_larger"]
    chance_swapped: Bool[Tensor, " n_larger"]


def choose(splits: Splits, fires: Bool[Tensor, " n_larger"], *, seed: int) -> Chosen:
    known = splits.parent >= 0
    novel = fires & ~known
    g, alive = np.random.default_rng(seed), fires.nonzero().squeeze(1).numpy()

    def drawn(like: Tensor) -> Tensor:
        mask = torch.zeros_like(fires)
        mask[torch.from_numpy(g.choice(alive, int(like.sum()), replace=False))] = True
        return mask

    return Chosen(novel, known, splits.n_children > 0, drawn(novel), drawn(known))


class Stitch:
    """The sums of one pair of dictionaries that rebuild the same rows."""

    def __init__(self, smaller: Dictionary, larger: Dictionary, chosen: Chosen, widths: tuple[int, ...]) -> None:
        """`widths`: of the hook points that both rebuild."""
        self._smaller, self._larger, self._chosen, self._widths = smaller, larger, chosen, widths
        self._totals: dict[str, ReconstructionSums] = {}
        self._alone = torch.zeros(larger.n_latents, len(widths), dtype=torch.float64)

    def add(
        self, target: Float[Tensor, "rows d_out"], active: tuple[Active, Active],
        rebuilt: tuple[Float[Tensor, "rows d_out"], Float[Tensor, "rows d_out"]],
    ) -> None:  # fmt: skip
        """Rows, and the active latents and reconstructions of the smaller and the larger dictionary."""
        (small, large), (x_small, x_large) = active, rebuilt
        chosen, W_small, W_large = self._chosen, self._smaller.parameters.W_dec, self._larger.parameters.W_dec
        of = {name: part(large, getattr(chosen, name)) for name in ("novel", "known", "chance_added", "chance_swapped")}
        decoded = {name: _decoded(each, W_large) for name, each in of.items()}
        kept = part(small, ~chosen.parents)
        rest = x_small - _decoded(part(small, chosen.parents), W_small)
        stages = {
            "smaller": (x_small, [small], []),
            "novel_added": (x_small + decoded["novel"], [small], [of["novel"]]),
            "swapped": (rest + decoded["known"], [kept], [of["known"]]),
            "stitched": (rest + decoded["known"] + decoded["novel"], [kept], [of["known"], of["novel"]]),
            "larger": (x_large, [], [large]),
            "chance_added": (x_small + decoded["chance_added"], [small], [of["chance_added"]]),
            "chance_swapped": (rest + decoded["chance_swapped"], [kept], [of["chance_swapped"]]),
        }
        n = self._smaller.n_latents
        for name, (x_hat, of_smaller, of_larger) in stages.items():
            latents = [each.indices for each in of_smaller] + [each.indices + n for each in of_larger]
            own = sums(
                target, x_hat, active=torch.cat(latents), n_latents=n + self._larger.n_latents, widths=self._widths
            )
            self._totals[name] = self._totals[name] + own if name in self._totals else own
        self._add_alone(target - x_small, large)

    def _add_alone(self, error: Float[Tensor, "rows d_out"], large: Active) -> None:
        """sum ||e - f w||^2 - ||e||^2 = sum f^2 ||w||^2 - 2 f e . w of each latent of the larger, by hook point."""
        W_dec, rows = self._larger.parameters.W_dec, large.rows
        for first in range(0, len(rows), PAIRS):
            some = slice(first, first + PAIRS)
            latent, value, e = large.indices[some], large.values[some, None].double(), error[rows[some]]
            each = zip(e.split(self._widths, 1), W_dec[latent].split(self._widths, 1), strict=True)
            dots = [((at * w).sum(1).double(), w.square().sum(1).double()) for at, w in each]
            dot, square = (torch.stack(column, 1) for column in zip(*dots, strict=True))
            self._alone.index_add_(0, latent, value.square() * square - 2 * value * dot)

    def alone(self) -> Float[Tensor, " n_larger"]:
        """The change of the FVU when this latent of the larger alone is added to the smaller; fp64."""
        widths = torch.tensor(self._widths).double()
        return (self._alone / variance(self._totals["smaller"]) * widths).sum(1) / widths.sum()

    def figures(self) -> dict[str, Any] | str:
        """FVU and L0 of every stage, and how many latents that are added alone lower the FVU; or why there are none."""
        if not self._totals:
            return "there are no rows"
        if is_constant(self._totals["smaller"]):
            return "the held-out rows are all the same"
        found = {name: figures(total) for name, total in self._totals.items()}
        if not all(math.isfinite(each.fvu) for each in found.values()):
            return "a reconstruction is not finite"
        base, alone, chosen = found["smaller"].fvu, self.alone(), self._chosen
        return {
            "stages": {
                name: {"fvu": each.fvu, "change": each.fvu - base, "l0": each.l0} for name, each in found.items()
            },
            "latents": {name: int(mask.sum()) for name, mask in chosen._asdict().items()},
            "improve_alone": {
                name: _share(alone < 0, mask) for name, mask in (("novel", chosen.novel), ("known", chosen.known))
            },
        }


def part(active: Active, keep: Bool[Tensor, " n_latents"]) -> Active:
    """The active latents that `keep` has."""
    there = keep[active.indices]
    counts = active.rows[there].bincount(minlength=len(active.offsets) - 1)
    return Active(active.values[there], active.indices[there], torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def _decoded(active: Active, W_dec: Tensor) -> Tensor:
    return active_decode(active, W_dec, torch.zeros_like(W_dec[0]))


def _share(what: Bool[Tensor, " n"], of: Bool[Tensor, " n"]) -> float | None:
    return float(what[of].double().mean()) if of.any() else None
