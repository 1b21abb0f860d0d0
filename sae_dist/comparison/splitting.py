"""How latents of a smaller dictionary split in a larger one: a tree of two levels, or a forest."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.comparison.matching import Nearest

KINDS = ("one_to_one", "split", "shared", "unmatched", "never_fires")  # of a latent of the smaller dictionary
ONE_TO_ONE, SPLIT, SHARED, UNMATCHED, NEVER_FIRES = range(len(KINDS))


class Splits(NamedTuple):
    """Each latent of the larger dictionary belongs to the one of the smaller that is nearest, if they match."""

    parent: Int[Tensor, " n_larger"]  # in the smaller; -1 of a novel latent, and of one that never fires
    value: Float[Tensor, " n_larger"]  # of the measure
    kind: Int[Tensor, " n_smaller"]
    order: Int[Tensor, " n_known"]  # latents of the larger that have a parent, by parent, the nearest first
    start: Int[Tensor, " n_smaller_1"]  # latent a of the smaller has order[start[a] : start[a + 1]]

    def children(self, latent: int) -> list[int]:
        return self.order[self.start[latent] : self.start[latent + 1]].tolist()

    @property
    def n_children(self) -> Int[Tensor, " n_smaller"]:
        return self.start.diff()

    def counts(self) -> dict[str, int]:
        found = self.kind.bincount(minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, found, strict=True))


def split(of_smaller: Nearest, of_larger: Nearest, *, level: float, fires: Tensor) -> Splits:
    """Two latents match where the measure is `level` or more; `fires` [n_smaller]: which of the smaller ever fire.

    one_to_one: one latent of the larger belongs to it; split: several do. shared: one of the larger matches it, but is
    nearer to another of the smaller. unmatched: none matches it.
    """
    matched = of_larger.best >= level
    parent = torch.where(matched, of_larger.latent[:, 0], -1)
    known = matched.nonzero().squeeze(1)
    known = known[of_larger.best[known].argsort(descending=True, stable=True)]
    order = known[parent[known].argsort(stable=True)]
    counts = parent[known].bincount(minlength=len(fires))
    kind = torch.full((len(fires),), UNMATCHED)
    kind[of_smaller.best >= level] = SHARED
    kind[counts == 1] = ONE_TO_ONE
    kind[counts > 1] = SPLIT
    kind[~fires] = NEVER_FIRES
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Splits(parent, of_larger.best, kind, order, start)
