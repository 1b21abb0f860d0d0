"""How frequent a concept has to be for a dictionary to have a latent of it.

A concept is a set of rows, here those of one token. A dictionary has it if a latent is active on these rows and on few
others: if the F1 score of its firings is `LEVEL` or more. The share of concepts that it has rises with their frequency
as a logistic curve in its logarithm, whose middle times the number of alive latents is the same for all sizes
(Templeton et al. 2024, "feature completeness").
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import expit

LEVEL = 0.5
STEEPEST = 20.0  # of a curve; where concepts are parted by their frequency alone there is no steepness


class Curve(NamedTuple):
    """P(has) = 1 / (1 + exp(-steepness (ln frequency - ln middle))), with 95 % intervals of the middle by bootstrap."""

    middle: float  # frequency of a concept that every second dictionary would have
    low: float
    high: float
    steepness: float


class Firings:
    """Counts firings of latents on concepts, a part of the rows at a time."""

    def __init__(self, n_latents: int, n_concepts: int) -> None:
        self._n_concepts = n_concepts
        self._of_latents = np.zeros(n_latents, np.int64)
        self._of_concepts = np.zeros(n_concepts, np.int64)
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, latent: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"], concept: Int[np.ndarray, " rows"]) -> None:
        """Active latents, the row of each, and the concept of every row."""
        self._of_latents += np.bincount(latent, minlength=len(self._of_latents))
        self._of_concepts += np.bincount(concept, minlength=self._n_concepts)
        keys, counts = np.unique(latent.astype(np.int64) * self._n_concepts + concept[row], return_counts=True)
        self._keys, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        self._counts = np.bincount(place, np.concatenate([self._counts, counts])).astype(np.int64)

    @property
    def alive(self) -> int:
        return int((self._of_latents > 0).sum())

    @property
    def rows(self) -> Int[np.ndarray, " n_concepts"]:
        return self._of_concepts

    def best(self) -> Float[np.ndarray, " n_concepts"]:
        """The largest F1 score of a latent for each concept."""
        latent, concept = np.divmod(self._keys, self._n_concepts)
        f1 = 2 * self._counts / (self._of_latents[latent] + self._of_concepts[concept])
        found = np.zeros(self._n_concepts)
        np.maximum.at(found, concept, f1)
        return found


def fit(
    frequency: Float[np.ndarray, " n"], has: Bool[np.ndarray, " n"], *, seed: int = 0, resamples: int = 200
) -> Curve | None:
    """The curve of largest likelihood; None where a dictionary has all concepts, or none."""
    if has.all() or not has.any():
        return None
    x = np.log(frequency)
    middle, steepness = _fit(x, has)
    chance, resampled = np.random.default_rng(seed), []
    for _ in range(resamples):
        some = chance.integers(len(x), size=len(x))
        if 0 < has[some].sum() < len(some):
            resampled.append(_fit(x[some], has[some])[0])
    low, high = np.exp(np.quantile(resampled, [0.025, 0.975]))
    return Curve(float(np.exp(middle)), float(low), float(high), steepness)


def spread(middles: Iterable[float]) -> float:
    """How far apart the largest and the smallest are: 0.15 is 15 %."""
    found = list(middles)
    return max(found) / min(found) - 1


def _fit(x: Float[np.ndarray, " n"], has: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    centre, scale = x.mean(), max(float(x.std()), 1e-9)

    def loss(at: Float[np.ndarray, " 2"]) -> tuple[float, Float[np.ndarray, " 2"]]:
        z = at[0] + at[1] * (x - centre) / scale
        wrong = expit(z) - has
        value = np.logaddexp(0, np.where(has, -z, z)).mean()
        return value, np.array([wrong.mean(), (wrong * (x - centre) / scale).mean()])

    found = minimize(loss, np.array([0.0, 1.0]), jac=True, method="L-BFGS-B", bounds=[(None, None), (1e-3, STEEPEST)])
    return float(centre - found.x[0] * scale / found.x[1]), float(found.x[1] / scale)
