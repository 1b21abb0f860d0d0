"""Worlds with known features: rows that are sparse sums of directions, and which of them are active in each row.

| world | what makes it hard |
|---|---|
| independent | 4 of 256 features in 64 dimensions, each by itself |
| correlated | features come in groups: one of a group makes the others more likely |
| hierarchy | a child is active only where its parent is; a parent also alone |
| zipf | feature i is active with a probability proportional to 1 / i |
| nuisance | the independent world, and a dense part of low rank with as much variance |
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

L0 = 4.0  # active features a row, in the mean


class Rows(NamedTuple):
    """Rows of a world, and the strength of every feature in them; 0 is inactive."""

    x: Float[Tensor, "rows d_model"]
    strength: Float[Tensor, "rows n_true"]


class World(NamedTuple):
    """A world: the directions of its features, and rows by a seed."""

    name: str
    directions: Float[Tensor, "n_true d_model"]
    activity: Callable[[int, torch.Generator], Bool[Tensor, "rows n_true"]]
    parents: dict[int, list[int]]  # of a hierarchy: a parent's children
    nuisance: Float[Tensor, "rank d_model"] | None = None

    def rows(self, n: int, *, seed: int) -> Rows:
        """`n` rows: sum of strength * direction over active features, strengths uniform in [0.5, 1.5]."""
        generator = torch.Generator().manual_seed(seed)
        active = self.activity(n, generator)
        strength = active * (0.5 + torch.rand(active.shape, generator=generator))
        x = strength @ self.directions
        if self.nuisance is not None:
            x = x + torch.randn(n, len(self.nuisance), generator=generator) @ self.nuisance
        return Rows(x, strength)


def unit_rows(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def independent(probability: Float[Tensor, " n_true"]) -> Callable[[int, torch.Generator], Tensor]:
    """Every feature by itself."""
    return lambda n, generator: torch.rand(n, len(probability), generator=generator) < probability


def correlated(n_true: int, group: int) -> Callable[[int, torch.Generator], Tensor]:
    """Groups of features: one is on in a quarter of the rows of which each of its members would have half its share."""
    p = L0 / n_true

    def activity(n: int, generator: torch.Generator) -> Tensor:
        on = (torch.rand(n, n_true // group, generator=generator) < 4 * p).repeat_interleave(group, 1)
        alone = torch.rand(n, n_true, generator=generator)
        return alone < torch.where(on, 0.25, 0.0)

    return activity


def hierarchical(n_parents: int, n_children: int) -> Callable[[int, torch.Generator], Tensor]:
    """Parents, then `n_children` of each: a parent is alone in half of its rows, else one child is active with it."""
    p = L0 / 1.5 / n_parents

    def activity(n: int, generator: torch.Generator) -> Tensor:
        parent = torch.rand(n, n_parents, generator=generator) < p
        which = torch.randint(0, 2 * n_children, (n, n_parents), generator=generator)
        child = torch.nn.functional.one_hot(which, 2 * n_children)[..., :n_children].bool() & parent[..., None]
        return torch.cat([parent, child.flatten(1)], 1)

    return activity


def world(name: str, *, n_true: int = 256, d_model: int = 64, seed: int = 0) -> World:
    """The world of that name; directions are random and of unit norm."""
    directions = unit_rows(n_true, d_model, seed)
    uniform = torch.full((n_true,), L0 / n_true)
    match name:
        case "independent":
            return World(name, directions, independent(uniform), {})
        case "correlated":
            return World(name, directions, correlated(n_true, 4), {})
        case "hierarchy":
            n_parents = n_true // 8
            children = {p: list(range(n_parents + 7 * p, n_parents + 7 * p + 7)) for p in range(n_parents)}
            return World(name, directions, hierarchical(n_parents, 7), children)
        case "zipf":
            share = 1 / torch.arange(1, n_true + 1)
            return World(name, directions, independent((L0 * share / share.sum()).clamp_max(0.9)), {})
        case "nuisance":
            rank = 4
            strength = (L0 * (1 + 1 / 12) / rank) ** 0.5  # E ||x||^2 of the sparse part, over the rank
            return World(name, directions, independent(uniform), {}, strength * unit_rows(rank, d_model, seed + 1))
    raise ValueError(f"{name} is no world")


WORLDS = ("independent", "correlated", "hierarchy", "zipf", "nuisance")
