"""Rates of a machine from measured steps: seconds = sum over kinds of work of amount / rate, no rate below zero."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from sae_dist.plan.machine import Backend, Rates
from sae_dist.plan.seconds import amounts
from sae_dist.plan.workload import Workload

KINDS = ("product", "select", "gather", "stream", "step")


class TimedStep(NamedTuple):
    """A workload and the measured seconds of its step."""

    work: Workload
    seconds: float


def rates(measured: Sequence[TimedStep], backend: Backend) -> Rates:
    """The rates whose predictions have the least squared relative error over the measured steps.

    A kind of work whose fitted cost is 0 gets the rate 1e18.
    """
    rows = np.array([[amounts(m.work, backend)[kind] for kind in KINDS] for m in measured])
    seconds = np.array([m.seconds for m in measured])
    costs = nonnegative(rows / seconds[:, None], np.ones(len(seconds)))
    product, select, gather, stream, step = (float(cost) for cost in costs)
    never = 1e18
    return Rates(
        product=1 / product if product else never,
        select=1 / select if select else None,
        gather=1 / gather if gather else never,
        stream=1 / stream if stream else never,
        step_s=step,
    )


def nonnegative(
    a: Float64[np.ndarray, "equations unknowns"], b: Float64[np.ndarray, " equations"]
) -> Float64[np.ndarray, " unknowns"]:
    """argmin ||a x - b|| over x >= 0, by least squares for every subset of unknowns; the others are 0.

    With five unknowns there are 31 subsets; the best feasible solution is the minimum.
    """
    scale = np.abs(a).max(0)
    scale[scale == 0] = 1
    n = a.shape[1]
    best, least = np.zeros(n), float(b @ b)
    for chosen in range(1, 1 << n):
        places = [i for i in range(n) if chosen >> i & 1]
        solution = np.linalg.lstsq(a[:, places] / scale[places], b, rcond=None)[0]
        if (solution < 0).any():
            continue
        x = np.zeros(n)
        x[places] = solution / scale[places]
        error = float(((a @ x - b) ** 2).sum())
        if error < least * (1 - 1e-12):
            best, least = x, error
    return best
