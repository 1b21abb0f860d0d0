"""Figures of a comparison as plain values: finite numbers, text, None, lists and dicts."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_dist.comparison.correlation import NONE
from sae_dist.comparison.matching import Nearest

Figures = dict[str, Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 25  # of a histogram from 0 to 1


def distribution(
    value: Float[Tensor, " n"], firings: Int[Tensor, " n"], *, there: Bool[Tensor, " n"] | None = None
) -> Figures:
    """Mean, quantiles and histogram over the latents that have a value; all equal, and weighted by their firings.

    `there`: which have one; by default those above NONE. A quantile is a value that there is. What is below 0 is
    counted in the first bin, what is above 1 in the last.
    """
    there = value > NONE if there is None else there
    values, weights = value[there].double().numpy(), firings[there].double().numpy()
    if not len(values):
        return {"latents": 0, "mean": None, "quantiles": None, "by_firings": None, "histogram": [0] * BINS}
    counts, _ = np.histogram(values.clip(0, 1), bins=BINS, range=(0, 1))
    return {
        "latents": len(values),
        "mean": float(values.mean()),
        "quantiles": quantiles(values, np.ones_like(weights)),
        "by_firings": {
            "mean": float(np.average(values, weights=weights)),
            "quantiles": quantiles(values, weights),
        },
        "histogram": counts.tolist(),
    }


def quantiles(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> dict[str, float]:
    found = np.quantile(values, QUANTILES, weights=weights, method="inverted_cdf")
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def compared(own: Nearest, chance: Nearest, firings: Int[Tensor, " n"], *, other: Nearest, level: float) -> Figures:
    """By one measure: the best matches of one dictionary's latents in another, beside chance, and how many match.

    `other` are those of the other's latents in this one.
    """
    alive = firings > 0
    return {
        "found": distribution(own.best, firings),
        "chance": distribution(chance.best, firings),
        "matched": {
            "found": _shares(own.best >= level, alive, firings),
            "chance": _shares(chance.best >= level, alive, firings),
        },
        "mutual": _shares(mutual(own, other), alive, firings),
    }


def mutual(own: Nearest, other: Nearest) -> Bool[Tensor, " n"]:
    """Which latents are the nearest of their nearest."""
    nearest = own.latent[:, 0]
    back = other.latent[nearest.clamp(min=0), 0]
    return (nearest >= 0) & (back == torch.arange(len(nearest)))


def _shares(what: Bool[Tensor, " n"], alive: Bool[Tensor, " n"], firings: Int[Tensor, " n"]) -> Figures:
    """Share of the latents that fire, and of all firings."""
    if not alive.any():
        return {"latents": None, "firings": None}
    of_firings = firings[what & alive].sum() / firings.sum()
    return {"latents": float(what[alive].double().mean()), "firings": float(of_firings)}
