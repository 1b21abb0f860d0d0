"""Least squares in logarithms of sums of two products of powers, ln(exp(A a) + exp(B b)): one fit, or many at once.

The second term is the irreducible part. Bounds keep exponents sane, and that part between nothing and the mean.
"""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

STEEPEST = 3.0  # bounds of exponents; the measured ones are a tenth of it
LEAST_FLOOR = 1e-4  # of the smallest value: an irreducible part below it is none
ROUNDS = 60  # of many fits at once
LEVELS = (0.001, 0.2, 0.5, 0.8)  # of the smallest value: irreducible parts from which a search starts


def model(
    thetas: np.ndarray, A: np.ndarray, B: np.ndarray
) -> tuple[Float[np.ndarray, "fits points"], Float[np.ndarray, "fits points"]]:
    """ln L, and the share of the first term in L."""
    first, second = thetas[:, : A.shape[1]] @ A.T, thetas[:, A.shape[1] :] @ B.T
    both = np.logaddexp(first, second)
    return both, np.exp(first - both)


def slopes(share: np.ndarray, A: np.ndarray, B: np.ndarray) -> Float[np.ndarray, "fits points parameters"]:
    """d ln L / d parameters."""
    return np.concatenate([share[..., None] * A, (1 - share)[..., None] * B], axis=-1)


def bounds(A: np.ndarray, B: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the parameters: exponents that are no nonsense, and an irreducible part from nothing to the mean of all L."""
    first = np.array([30.0, *[STEEPEST] * (A.shape[1] - 1)])
    second = np.full(B.shape[1] - 1, STEEPEST)
    low = np.concatenate([-first, [float(y.min()) + math.log(LEAST_FLOOR)], -second])
    return low, np.concatenate([first, [float(y.mean())], second])


def starts(A: np.ndarray, B: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Where to search from: shares of the smallest L as the irreducible part, the rest by linear least squares."""
    low, high = bounds(A, B, y)
    for share in LEVELS:
        part = share * math.exp(float(y.min()))
        rest = np.linalg.lstsq(A, np.log(np.exp(y) - part), rcond=None)[0]
        yield np.clip(np.concatenate([rest, [math.log(part)], np.zeros(B.shape[1] - 1)]), low + 1e-6, high - 1e-6)


def best(A: np.ndarray, B: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " parameters"]:
    """The least squares of several starts."""
    from scipy import optimize

    def residuals(theta: np.ndarray) -> np.ndarray:
        return model(theta[None], A, B)[0][0] - y

    def jacobian(theta: np.ndarray) -> np.ndarray:
        return slopes(model(theta[None], A, B)[1], A, B)[0]

    within = bounds(A, B, y)
    found = (
        optimize.least_squares(residuals, start, jacobian, within, x_scale="jac", xtol=1e-10, ftol=1e-10)  # type: ignore[arg-type]
        for start in starts(A, B, y)
    )
    return min(found, key=lambda one: one.cost).x


def refitted(A: np.ndarray, B: np.ndarray, ys: np.ndarray, start: np.ndarray) -> Float[np.ndarray, "fits parameters"]:
    """Levenberg-Marquardt on many samples at once, each within its bounds and until it gains no more."""
    low, high = map(np.array, zip(*(bounds(A, B, y) for y in ys), strict=True))
    thetas, damping = np.clip(start[None], low, high), np.full(len(ys), 1e-3)
    live = np.arange(len(ys))
    for _ in range(ROUNDS):
        fitted, share = model(thetas[live], A, B)
        J, left = slopes(share, A, B), ys[live] - fitted
        H = J.transpose(0, 2, 1) @ J
        diagonal = np.einsum("spp->sp", H) * damping[live, None] + 1e-12
        step = np.linalg.solve(H + diagonal[..., None] * np.eye(H.shape[-1]), J.transpose(0, 2, 1) @ left[..., None])
        moved = np.clip(thetas[live] + step[..., 0], low[live], high[live])
        errors, then = (left**2).sum(1), ((ys[live] - model(moved, A, B)[0]) ** 2).sum(1)
        better = then < errors
        thetas[live] = np.where(better[:, None], moved, thetas[live])
        damping[live] *= np.where(better, 0.2, 4.0)
        live = live[np.where(better, errors - then > 1e-6 * errors, damping[live] < 1e6)]
        if not len(live):
            break
    return thetas
