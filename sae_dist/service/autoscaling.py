"""How many replicas a harvest should have, from who waited for whom. Pure: all inputs are arguments.

Starving consumers need more producers; blocked producers are too many. One interval says little (a checkpoint, a slow
unit), so `PATIENCE` intervals in a row must agree, and after a change nothing is decided until its effect shows.
"""

from typing import NamedTuple

INTERVAL_S = 10.0  # what one observation covers
PATIENCE = 3  # observations in a row that must agree
SETTLING = 3  # observations after a change, or while a replica starts, that are ignored
STARVED, BLOCKED = 0.05, 0.25  # shares of the time; apart, so that a harvest between them is left as it is


class Observation(NamedTuple):
    """One interval: the share of it that the hungriest consumer starved, and the share that producers were blocked."""

    starved: float
    blocked: float


class ScaleState(NamedTuple):
    """How many replicas are wanted; votes in a row for one more (positive) or fewer (negative); intervals to ignore."""

    wanted: int
    votes: int = 0
    settling: int = 0


def decide(scale: ScaleState, seen: Observation, *, least: int, most: int, starting: bool) -> ScaleState:
    """The scale after one more interval; within [least, most] and by one replica at a time.

    starting: some replica is not at work yet, so the observation does not count
    """
    if starting:
        return scale._replace(votes=0, settling=SETTLING)
    if scale.settling:
        return scale._replace(votes=0, settling=scale.settling - 1)
    vote = 0
    if seen.blocked > BLOCKED:  # first: a consumer that starves beside a full store starves for another reason
        vote = -1
    elif seen.starved > STARVED and seen.blocked == 0:
        vote = 1
    if not vote or not least <= scale.wanted + vote <= most:
        return scale._replace(votes=0)
    votes = vote if scale.votes * vote < 0 else scale.votes + vote
    if abs(votes) < PATIENCE:
        return scale._replace(votes=votes)
    return ScaleState(scale.wanted + vote, 0, SETTLING)
