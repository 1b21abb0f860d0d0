"""Successive halving: all points train for a few steps, the better ones for more, the best ones to the end.

A rung is a training of its own, with fewer steps, in which the learning rate rises and falls as in a long one. So its
held-out FVU is that of a whole short run, and points compare; and a rung resumes, or is trained in a shared pass, as
any run. What a rung costs is its share of the steps. (Jamieson & Talwalkar 2016; scikit-learn's HalvingGridSearchCV.)
"""

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from sae_dist.config import frozen


@frozen
class HalvingConfig:
    """When points are compared, and how many of them go on."""

    # shares of the steps, rising: [0.1, 0.3] compares after a tenth and after three tenths of them; []: never
    rungs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    keep: Annotated[float, Field(gt=0, lt=1)] = 1 / 3  # share of the points of a rung that goes on, one at least

    def __post_init__(self) -> None:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"sweep.halving.rungs={list(self.rungs)} do not rise; give them in rising order")

    def steps(self, n_steps: int) -> list[int]:
        """The steps of every rung of a training of `n_steps`; rungs that come to the same number are one."""
        found = sorted({max(math.ceil(share * n_steps), 1) for share in self.rungs})
        return [steps for steps in found if steps < n_steps]


def best(fvu: Mapping[str, float | None], keep: float) -> list[str]:
    """The points that go on from a rung, the best first: those of the lowest FVU, and of equal ones the lowest id.

    A point without a figure is the worst.
    """
    order = sorted(fvu, key=lambda point: (math.inf if (own := fvu[point]) is None else own, point))
    return order[: max(math.ceil(keep * len(order)), 1)] if order else []
