"""The numerics guard: what to do about a step whose loss is not finite or far too large.

A pure state machine from a step's losses to a decision. Its state is part of a checkpoint, so that a resumed run
decides as an uninterrupted one.
"""

import math
from collections.abc import Mapping
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from sae_dist.config import frozen, load

Decision = Literal["step", "skip", "roll_back", "stop"]

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution times this is its standard deviation
LEAST_SPREAD = 1e-3  # of the median: a constant loss has no spread of its own
# Adam squares gradients, and an infinite square never leaves its moments. A pair's gradient is at most 2 / (batch var)
# |z| ||error||; of a row, |z| is about ||x|| at most and ||error|| at least 2^-24 ||x||, for that is how fp32 rounds.
# So no element of a gradient is above 2^25 loss, and 2^24 of them squared sum up to less than 2^127 for losses below:
LARGEST_LOSS = 2.0**26  # in units of the rows' variance, so that anything near it is no data to learn from


@frozen
class GuardConfig:
    """When a step is skipped, when the run rolls back, and when it stops."""

    max_skipped: Annotated[int, Field(ge=1)] = 10  # steps skipped in a row; then the run rolls back to a checkpoint
    max_roll_backs: Annotated[int, Field(ge=0)] = 2  # then the run stops
    spike_window: Annotated[int, Field(ge=0)] = 100  # accepted steps whose losses say what is usual; 0: no spikes
    spike_deviations: Annotated[float, Field(gt=0)] = 12.0  # robust standard deviations above the median
    on_spike: Literal["alert", "skip"] = "alert"  # skip: no update from such a step


class Guard(NamedTuple):
    """What the guard remembers between two steps."""

    losses: tuple[float, ...] = ()  # of the last accepted steps, at most `spike_window`
    in_a_row: int = 0  # steps skipped since one was accepted
    skipped: int = 0  # steps skipped in the whole run
    spikes: int = 0  # steps whose loss spiked in the whole run
    spiking: bool = False  # the step before this one spiked
    roll_backs: int = 0


class Verdict(NamedTuple):
    """What to do with the present step, and the guard after it."""

    decision: Decision
    guard: Guard
    alert: str | None = None  # a message for a person


def judge(guard: Guard, config: GuardConfig, *, loss: float, aux_loss: float = 0.0, finite: bool = True) -> Verdict:
    """The verdict on a step before its update; `finite`: whether all gradients are.

    Every rank must pass the same values: losses of the whole mesh, and `finite` over all ranks.
    """
    flaw = _flaw(loss, aux_loss, finite)
    spike = flaw is None and _is_spike(guard, config, loss)
    counted = guard._replace(spikes=guard.spikes + spike, spiking=spike)
    if flaw is None and not (spike and config.on_spike == "skip"):
        losses = (*guard.losses, loss)[-config.spike_window :] if config.spike_window else ()
        alert = f"{_spike(guard, loss)}; it was learned from" if spike and not guard.spiking else None
        return Verdict("step", counted._replace(losses=losses, in_a_row=0), alert)
    what = flaw or _spike(guard, loss)
    in_a_row = guard.in_a_row + 1
    counted = counted._replace(in_a_row=in_a_row, skipped=guard.skipped + 1)
    if in_a_row < config.max_skipped:
        return Verdict("skip", counted, f"{what}; the step is left out" if in_a_row == 1 else None)
    return _back(counted, config, f"{what}, for {in_a_row} steps in a row")


def judge_state(guard: Guard, config: GuardConfig) -> Verdict:
    """The verdict on a dictionary that has a weight or moment that is not finite."""
    return _back(guard, config, "a weight or a moment is not finite")


def _back(guard: Guard, config: GuardConfig, what: str) -> Verdict:
    """Roll back, or stop where roll-backs are used up."""
    if guard.roll_backs < config.max_roll_backs:
        back = guard._replace(in_a_row=0, roll_backs=guard.roll_backs + 1)
        return Verdict("roll_back", back, f"{what}; going back (roll-back {back.roll_backs})")
    return Verdict("stop", guard, f"{what}, after {guard.roll_backs} roll-backs")


def to_facts(guard: Guard) -> dict[str, Any]:
    """As JSON values, exact: floats read back as the same bits."""
    return guard._asdict()


def from_facts(facts: Mapping[str, Any]) -> Guard:
    """UserError where these are not the facts of a guard."""
    return load(Guard, facts)


def _flaw(loss: float, aux_loss: float, finite: bool) -> str | None:
    """Why a step must not update the dictionary; None where it may."""
    if not (finite and math.isfinite(loss) and math.isfinite(aux_loss)):
        return "the loss or a gradient is not finite"
    if max(loss, aux_loss) > LARGEST_LOSS:
        return f"the loss of {max(loss, aux_loss):.4g} is too large: its gradients have no finite squares"
    return None


def _is_spike(guard: Guard, config: GuardConfig, loss: float) -> bool:
    """Whether the loss is far above the window's median; never before the window is half full.

    Median and median absolute deviation still work where almost half of the window are spikes.
    """
    if len(guard.losses) < max(config.spike_window / 2, 1):
        return False
    middle = median(guard.losses)
    spread = MAD_TO_SIGMA * median(abs(past - middle) for past in guard.losses)
    return loss > middle + config.spike_deviations * max(spread, LEAST_SPREAD * abs(middle))


def _spike(guard: Guard, loss: float) -> str:
    return f"the loss jumped to {loss:.4g} (median of the last {len(guard.losses)} steps: {median(guard.losses):.4g})"
