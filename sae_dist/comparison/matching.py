"""For every latent of two dictionaries the latents of the other that are most like it, and what chance would give."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.comparison.activations import Activations
from sae_dist.comparison.config import Measure
from sae_dist.comparison.correlation import NONE, blocks, correlation
from sae_dist.progress import logged

KEPT = 2  # the nearest, and the second


class Side(NamedTuple):
    """A dictionary as far as it is compared."""

    activations: Activations
    directions: Float[Tensor, "n_latents d_out"] | None  # decoder rows; None where the other's are of another space


class Nearest:
    """For each of n latents the `kept` most like it by one measure, and other figures of the same pairs.

    latent [n, kept], -1 where there are fewer; value [n, kept], NONE there; others [n, kept, figures], NaN there.
    """

    def __init__(self, n: int, *, kept: int = KEPT, figures: int = 1) -> None:
        self.latent = torch.full((n, kept), -1)
        self.value = torch.full((n, kept), NONE)
        self.others = torch.full((n, kept, figures), torch.nan)

    @property
    def best(self) -> Float[Tensor, " n"]:
        """The value of the nearest; NONE where there is none."""
        return self.value[:, 0]

    def offer(
        self, own: range, value: Float[Tensor, "own m"], others: list[Float[Tensor, "own m"]], *, first: int
    ) -> None:
        """Latents of the other dictionary from `first` on, for the latents `own` of this one."""
        here, kept = slice(own.start, own.stop), self.latent.shape[1]
        value, at = value.topk(min(kept, value.shape[1]), dim=1)
        found = torch.stack([each.gather(1, at) for each in others], dim=2)
        values = torch.cat([self.value[here], value], 1)
        latents = torch.cat([self.latent[here], at + first], 1)
        figures = torch.cat([self.others[here], found.to(self.others.dtype)], 1)
        best, order = values.topk(kept, dim=1)
        there = best > NONE
        self.value[here] = best
        self.latent[here] = torch.where(there, latents.gather(1, order), -1)
        taken = figures.gather(1, order[:, :, None].expand(-1, -1, figures.shape[2]))
        self.others[here] = torch.where(there[:, :, None], taken, torch.nan)


class Matches(NamedTuple):
    """The nearest of each latent of both dictionaries, by each measure; None where it is not defined."""

    first: dict[Measure, Nearest]  # for latents of the first dictionary, in the second
    second: dict[Measure, Nearest]


def match(a: Side, b: Side, order: Int[np.ndarray, " rows"] | None = None, *, said: str = "correlated") -> Matches:
    """Compares every latent of `a` with every one of `b`, a block at a time; those that never fire are left out.

    With `order`, row t of `a` meets row order[t] of `b`. `said` is for the log.
    """
    measures: tuple[Measure, ...] = ("correlation",) if a.directions is None else ("correlation", "cosine")
    n, m = a.activations.n_latents, b.activations.n_latents
    found = Matches({name: Nearest(n) for name in measures}, {name: Nearest(m) for name in measures})
    norms = None if b.directions is None else b.directions.norm(dim=1)
    parts = blocks(n, m)
    for latents in logged(parts, said, len(parts), of=f"times {len(parts[0]):,} latents" if parts else "latents"):
        values = {"correlation": correlation(a.activations, b.activations, latents, order).float()}
        if a.directions is not None and b.directions is not None and norms is not None:
            here = slice(latents.start, latents.stop)
            cosine = cosines(a.directions[here], b.directions, norms)
            cosine[~a.activations.fires[here]] = NONE
            cosine[:, ~b.activations.fires] = NONE
            values["cosine"] = cosine
        for name in measures:
            others = [torch.where(each > NONE, each, torch.nan) for key, each in values.items() if key != name]
            others = others or [torch.full_like(values[name], torch.nan)]
            found.first[name].offer(latents, values[name], others, first=0)
            found.second[name].offer(range(m), values[name].T, [each.T for each in others], first=latents.start)
    return found


def cosines(
    rows: Float[Tensor, "some d"], others: Float[Tensor, "m d"], norms: Float[Tensor, " m"]
) -> Float[Tensor, "some m"]:
    """Of every row with every one of `others`, whose norms are given; 0 where a norm is 0."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (unit @ others.T).div_(norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp_(-1, 1)


def by_chance(a: Side, b: Side, *, seed: int) -> Matches:
    """`match` where nothing is the same: rows of `b` shuffled, and each coordinate of its directions over its latents.

    So how often and how strongly each latent fires stays as it is, and so do the mean and spread of each coordinate.
    """
    g = np.random.default_rng(seed)
    order = g.permutation(a.activations.rows)
    directions = None if b.directions is None else b.directions.clone()
    if directions is not None:
        for column in directions.T:
            column.copy_(column[torch.from_numpy(g.permutation(len(column)))])
    return match(a, b._replace(directions=directions), order, said="by chance: correlated")
