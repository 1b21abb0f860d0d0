"""Scaling laws: the error of a dictionary as a function of its size or of compute, and of k.

    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)      (Gao et al. 2024)

The second term is what no number of latents removes. It is fitted by least squares in ln L. Where k has two values,
gamma and eta are left out, where it has one also beta_k. The law of compute has the same form, with C in the place
of n. Nothing here knows points or files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sae_dist.sweep import least_squares

NAMES = ("alpha", "beta_k", "beta_x", "gamma", "zeta", "eta")
OPENAI: dict[str, float] = dict(zip(NAMES, (-0.50, 0.26, -0.017, -0.042, -1.32, -0.085), strict=True))  # of GPT-4
USED = {1: (0, 2, 4), 2: (0, 1, 2, 4), 3: (0, 1, 2, 3, 4, 5)}  # parameters by how many values k has, 3 for more
FORMS = {
    1: "L = exp(α + β_{x} ln {x}) + exp(ζ)",
    2: "L = exp(α + β_k ln k + β_{x} ln {x}) + exp(ζ)",
    3: "L = exp(α + β_k ln k + β_{x} ln {x} + γ ln k ln {x}) + exp(ζ + η ln k)",
}
RANGE = 4.0  # the least factor between the smallest and the largest x
SPARE = 2  # points more than parameters
CERTAIN = 0.01  # a trend that chance would show this often is none
RESAMPLES = 500
LEAST_START = 0.1  # of the smallest L: the irreducible part from which resampled fits start, at least
TAIL = 0.05 / 2 / 2  # beyond each end of an interval: 5 % for the exponents of size and of k at once

Why = Literal["points", "range of x", "k", "flat", "flat in k", "grows", "noise", "uncertain"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval, wide enough for both exponents of a law to be within theirs at once."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Refusal:
    """Why the data do not support a law, and what would do, as a clause."""

    why: Why
    text: str


@dataclass(frozen=True)
class Fit:
    """A law that the data support."""

    values_of_k: int  # 1, 2, or 3 for more
    centre: tuple[float, float]  # means of ln x and ln k: parameters inside are about it
    best: Float[np.ndarray, " parameters"]
    samples: Float[np.ndarray, "resamples parameters"]
    residuals: Float[np.ndarray, " points"]  # ln of measured over fitted
    spare: int  # points less parameters

    @property
    def scatter(self) -> float:
        """Standard deviation of a point about the law, in ln L."""
        return math.sqrt(float(self.residuals @ self.residuals) / self.spare)

    def at(self, x: float, k: float) -> Interval:
        """The law at a size and a k; the interval is of the law, a single point scatters about it."""
        sampled = self.sampled(x, k)
        return _interval(math.exp(float(self._log(self.best[None], x, k)[0])), np.exp(sampled))

    def sampled(self, x: float, k: float) -> Float[np.ndarray, " resamples"]:
        """ln L at a place by each resampled fit."""
        return self._log(self.samples, x, k)

    def _log(self, thetas: np.ndarray, x: float, k: float) -> Float[np.ndarray, " fits"]:
        A, B = _terms(np.array([x]), np.array([k]), self.centre, self.values_of_k)
        return least_squares.model(thetas, A, B)[0][:, 0]

    @property
    def exponents(self) -> dict[str, Interval]:
        """d ln L / d ln x, and / d ln k, of the first term in the middle of the data."""
        places = {"x": USED[self.values_of_k].index(2)}
        if self.values_of_k > 1:
            places["k"] = USED[self.values_of_k].index(1)
        return {name: _interval(float(self.best[at]), self.samples[:, at]) for name, at in places.items()}

    @property
    def floor(self) -> Interval:
        """The irreducible part at the middle k."""
        at = USED[self.values_of_k].index(4)
        return _interval(math.exp(float(self.best[at])), np.exp(self.samples[:, at]))

    @property
    def parameters(self) -> dict[str, Interval]:
        """As the form has them. They hang together: an interval of one alone says little about the curve."""
        best, samples = (_uncentred(each, self.centre, self.values_of_k) for each in (self.best[None], self.samples))
        return {
            NAMES[which]: _interval(float(best[0, at]), samples[:, at])
            for at, which in enumerate(USED[self.values_of_k])
        }


def fit(
    x: Float[np.ndarray, " points"],
    k: Float[np.ndarray, " points"],
    loss: Float[np.ndarray, " points"],
    *,
    resamples: int = RESAMPLES,
) -> Fit | Refusal:
    """The law of these points, or why they do not support one. All values are positive. Equal points, equal fits."""
    values_of_k = min(3, len(set(k.tolist())))
    if refused := _too_little(x, values_of_k) or no_trend(x, k, loss):
        return refused
    y, centre = np.log(loss), (float(np.log(x).mean()), float(np.log(k).mean()))
    A, B = _terms(x, k, centre, values_of_k)
    best = least_squares.best(A, B, y)
    fitted = least_squares.model(best[None], A, B)[0][0]
    spare = len(y) - len(best)
    found = Fit(values_of_k, centre, best, _resampled(A, B, y, fitted, best, resamples), y - fitted, spare)
    return _doubtful(found, fitted) or found


def _too_little(x: np.ndarray, values_of_k: int) -> Refusal | None:
    sizes, least = sorted(set(x.tolist())), len(USED[values_of_k]) + SPARE
    if len(sizes) < 3 or sizes[-1] < RANGE * sizes[0]:
        span = f" from {sizes[0]:,.4g} to {sizes[-1]:,.4g}" if len(sizes) > 1 else ""
        return Refusal(
            "range of x",
            f"{len(sizes)} different {'size' if len(sizes) == 1 else 'sizes'}{span}, and a curve needs three or more "
            f"over a factor of {RANGE:g} or more",
        )
    if len(x) < least:
        return Refusal("points", f"{len(x)} points for {least - SPARE} unknowns; {least} or more would do")
    return None


def no_trend(x: np.ndarray, k: np.ndarray, loss: np.ndarray) -> Refusal | None:
    """Whether a power law without the irreducible term, which is linear in logarithms, explains more than chance."""
    u, v, y = np.log(x) - np.log(x).mean(), np.log(k) - np.log(k).mean(), np.log(loss)
    alone, of_k = np.ones_like(u), [v] if len(set(k.tolist())) > 1 else []
    slopes, left = _linear([alone, u, *of_k], y)
    spare = len(y) - 2 - len(of_k)
    for name, others, why in (("size", [alone, *of_k], "flat"), ("k", [alone, u], "flat in k")):
        if name == "k" and not of_k:
            continue
        without = _linear(others, y)[1]
        if _chance(without, left, spare) > CERTAIN:
            number, along = (1, u) if name == "size" else (2, v)
            change = math.exp(float(slopes[number] * np.ptp(along))) - 1
            return Refusal(
                why,  # type: ignore[arg-type]
                f"no trend with {name} that chance would not show as well: from the smallest to the largest the error "
                f"changes by {change:.2%}, and points scatter by {math.sqrt(left / spare):.2%}",
            )
    if slopes[1] > 0:
        return Refusal("grows", "the error grows with size, so the larger points are not trained to their end")
    total = float(((y - y.mean()) ** 2).sum())
    if left > total / 2:
        return Refusal("noise", f"points scatter more than they follow a trend ({1 - left / total:.0%} explained)")
    return None


def _doubtful(found: Fit, fitted: np.ndarray) -> Refusal | None:
    """Whether a fit says less than it seems to."""
    if found.scatter > float(fitted.std()):
        return Refusal("noise", f"points scatter by {found.scatter:.2%} about the law, more than its trend")
    slope = found.exponents["x"]
    if slope.high >= 0:
        within = f"{slope.value:.3g}, and anything from {slope.low:.3g} to {slope.high:.3g}"
        return Refusal("uncertain", f"the exponent of size may be 0: it is {within}")
    return None


def _linear(columns: Sequence[np.ndarray], y: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients and the sum of squares that is left."""
    design = np.stack(columns, axis=1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    left = y - design @ solution
    return solution, float(left @ left)


def _chance(without: float, left: float, spare: int) -> float:
    """How often noise alone would make one more column explain so much (F test)."""
    from scipy import stats

    if without <= 1e-12 * spare:
        return 1.0  # constant to the last digit
    if left <= 1e-12 * without:
        return 0.0
    return float(stats.f.sf((without - left) / (left / spare), 1, spare))


def _terms(
    x: np.ndarray, k: np.ndarray, centre: tuple[float, float], values_of_k: int
) -> tuple[Float[np.ndarray, "points first"], Float[np.ndarray, "points second"]]:
    """Columns of the two exponents, about the centre of the data."""
    u, v = np.log(x) - centre[0], np.log(k) - centre[1]
    columns = (np.ones_like(u), v, u, u * v, np.ones_like(u), v)
    first = [columns[which] for which in USED[values_of_k] if which < 4]
    second = [columns[which] for which in USED[values_of_k] if which >= 4]
    return np.stack(first, axis=1), np.stack(second, axis=1)


def _resampled(
    A: np.ndarray, B: np.ndarray, y: np.ndarray, fitted: np.ndarray, best: np.ndarray, resamples: int
) -> Float[np.ndarray, "resamples parameters"]:
    """Fits to the law plus residuals drawn among those of all points.

    Residuals are enlarged for the parameters that the fit has spent, and as Student's t is wider than a normal
    distribution, since there are few of them.
    """
    from scipy import stats

    spare = len(y) - len(best)
    wider = math.sqrt(len(y) / spare) * stats.t.isf(TAIL, spare) / stats.norm.isf(TAIL)
    left = y - fitted
    drawn = np.random.default_rng(0).choice(wider * (left - left.mean()), size=(resamples, len(y)))
    raised = best.copy()  # from nothing at all an irreducible part would not grow
    raised[A.shape[1]] = max(best[A.shape[1]], float(fitted.min()) + math.log(LEAST_START))
    return least_squares.refitted(A, B, fitted + drawn, raised)


def _uncentred(thetas: np.ndarray, centre: tuple[float, float], values_of_k: int) -> np.ndarray:
    """Parameters of the form as it is written, from those about the centre."""
    whole = np.zeros((len(thetas), len(NAMES)))
    whole[:, list(USED[values_of_k])] = thetas
    a, of_k, of_x, both, floor, floor_k = whole.T
    x0, k0 = centre
    alpha = a - of_k * k0 - of_x * x0 + both * x0 * k0
    raw = np.stack((alpha, of_k - both * x0, of_x - both * k0, both, floor - floor_k * k0, floor_k), axis=1)
    return raw[:, list(USED[values_of_k])]


def _interval(value: float, samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, (TAIL, 1 - TAIL))
    return Interval(value, float(min(low, value)), float(max(high, value)))
