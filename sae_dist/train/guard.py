"""The numerics guard: what to do about a step whose loss is not a number, not finite, or out of all proportion.

A pure state machine: figures in, a decision out. Its state is part of a checkpoint, so that a run that was stopped
decides as one that was not.
"""

import math
from collections.abc import Mapping
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from sae_dist.config import frozen

Decision = Literal["step", "skip", "roll_back", "stop"]

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution times this is its standard deviation
LEAST_SPREAD = 1e-3  # of the median: a loss that stands still has no spread of its own


@frozen
class GuardConfig:
    """When a step is left out, when the run goes back, when it gives up."""

    max_skipped: Annotated[int, Field(ge=1)] = 10  # steps left out in a row; then back to the last checkpoint
    max_roll_backs: Annotated[int, Field(ge=0)] = 2  # then the run stops
    spike_window: Annotated[int, Field(ge=0)] = 100  # accepted steps whose losses say what is usual; 0: no spikes
    spike_deviations: Annotated[float, Field(gt=0)] = 12.0  # robust standard deviations above the median
    on_spike: Literal["alert", "skip"] = "alert"  # skip: nothing is learned from such a step


class Guard(NamedTuple):
    """What the guard remembers between two steps."""

    losses: tuple[float, ...] = ()  # of the last accepted steps, at most `spike_window`
    in_a_row: int = 0  # steps left out since one was accepted
    skipped: int = 0  # steps left out, of the whole run
    spikes: int = 0  # steps whose loss spiked, of the whole run
    spiking: bool = False  # the step before this one spiked
    roll_backs: int = 0


class Verdict(NamedTuple):
    """What to do with the present step, and the guard after it."""

    decision: Decision
    guard: Guard
    alert: str | None = None  # what a person should be told


def judge(guard: Guard, config: GuardConfig, *, loss: float, finite: bool = True) -> Verdict:
    """The verdict on a step before its update; `finite`: that nothing in the gradients is NaN or infinite.

    Every rank must give the same figures: the loss of the whole mesh, and `finite` of all ranks together.
    """
    finite = finite and math.isfinite(loss)
    spike = finite and _is_spike(guard, config, loss)
    counted = guard._replace(spikes=guard.spikes + spike, spiking=spike)
    if finite and not (spike and config.on_spike == "skip"):
        losses = (*guard.losses, loss)[-config.spike_window :] if config.spike_window else ()
        alert = f"{_spike(guard, loss)}; it was learned from" if spike and not guard.spiking else None
        return Verdict("step", counted._replace(losses=losses, in_a_row=0), alert)
    what = _spike(guard, loss) if spike else "the loss or a gradient is not finite"
    in_a_row = guard.in_a_row + 1
    counted = counted._replace(in_a_row=in_a_row, skipped=guard.skipped + 1)
    if in_a_row < config.max_skipped:
        return Verdict("skip", counted, f"{what}; the step is left out" if in_a_row == 1 else None)
    if guard.roll_backs < config.max_roll_backs:
        back = counted._replace(in_a_row=0, roll_backs=guard.roll_backs + 1)
        return Verdict(
            "roll_back", back, f"{what}, for {in_a_row} steps in a row; going back (roll-back {back.roll_backs})"
        )
    return Verdict("stop", counted, f"{what}, for {in_a_row} steps in a row, after {guard.roll_backs} roll-backs")


def to_facts(guard: Guard) -> dict[str, Any]:
    """As JSON values, exact: Python writes floats so that they read back as the same bits."""
    return guard._asdict()


def from_facts(facts: Mapping[str, Any]) -> Guard:
    return Guard(**{**facts, "losses": tuple(facts["losses"])})


def _is_spike(guard: Guard, config: GuardConfig, loss: float) -> bool:
    """Whether the loss lies far above the window's median; not before the window is half full.

    Median and median absolute deviation: up to half of the window may be spikes without hiding the next one.
    """
    if len(guard.losses) < max(config.spike_window / 2, 1):
        return False
    middle = median(guard.losses)
    spread = MAD_TO_SIGMA * median(abs(past - middle) for past in guard.losses)
    return loss > middle + config.spike_deviations * max(spread, LEAST_SPREAD * abs(middle))


def _spike(guard: Guard, loss: float) -> str:
    return f"the loss jumped to {loss:.4g} (median of the last {len(guard.losses)} steps: {median(guard.losses):.4g})"
