"""Which points train in one pass: those that want the same rows in the same batches, as many as memory holds.

A pass reads, moves and casts every batch once for all of its points; each learns from it by itself, so that its
dictionary is the one that training it alone would give. What a point may have of its own are the keys in OWN.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sae_dist.config import digest

OWN = ("sae", "train.lr", "train.parameters", "train.moments", "train.start_from")


class Candidate(NamedTuple):
    """A point that may be trained now."""

    id: str
    shared: str  # equal for points that may train in one pass
    most: int | None = None  # points that its pass may have at most; None: any number


def shared_by(values: Mapping[str, Any]) -> str:
    """A digest of a configuration without what its point has of its own, and without where it is written to."""
    train = {key: value for key, value in values["train"].items() if f"train.{key}" not in OWN}
    others = {key: value for key, value in values.items() if key not in (*OWN, "out")}
    return digest(others | {"train": train})[:16]


def passes(
    candidates: Iterable[Candidate], *, fits: Callable[[Sequence[str]], bool], most: int | None, at_once: int
) -> list[list[str]]:
    """The candidates in passes, in their order: as few as hold them, but `at_once` if there are so many candidates.

    `fits` tells whether memory holds a pass of these points; a point alone is a pass in any case, since nothing smaller
    is. `most`: points a pass.
    """
    together: dict[tuple[str, int | None], list[str]] = {}
    for each in candidates:
        together.setdefault((each.shared, each.most), []).append(each.id)
    found: list[list[str]] = []
    for (_, own_most), points in together.items():
        limit = min(filter(None, (most, own_most, len(points))))
        found += _filled(points, limit, fits)
    while len(found) < at_once and max(map(len, found), default=1) > 1:
        largest = max(found, key=len)
        at, half = found.index(largest), -(-len(largest) // 2)
        found[at : at + 1] = [largest[:half], largest[half:]]
    return found


def _filled(points: Sequence[str], limit: int, fits: Callable[[Sequence[str]], bool]) -> list[list[str]]:
    """One pass after the other is filled."""
    found: list[list[str]] = []
    for point in points:
        if found and len(found[-1]) < limit and fits([*found[-1], point]):
            found[-1].append(point)
        else:
            found.append([point])
    return found
