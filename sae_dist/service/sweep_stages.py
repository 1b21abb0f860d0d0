"""Which training of a point is next: the rungs of a stopping rule one after the other, then the whole one."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from sae_dist.service.passes import adopt
from sae_dist.service.summary import read_summary
from sae_dist.service.sweep_points import Planned, rungs
from sae_dist.sweep.folder import SweepFolder
from sae_dist.sweep.halving import HalvingConfig, best
from sae_dist.sweep.ledger import Ledger
from sae_dist.sweep.point import State

logger = logging.getLogger(__name__)


class Stages:
    """The trainings that there may be of every point. Without rungs there is the whole one alone.

    All that it decides is a function of the ledger and of the figures in the rungs' folders: every driver, and every
    start of one, decides the same.
    """

    def __init__(
        self, planned: Sequence[Planned], halving: HalvingConfig, folder: SweepFolder, ledger: Ledger
    ) -> None:  # fmt: skip
        self.points = {point.id: point for point in planned}
        self._rungs = {point.id: rungs(point, halving, folder) for point in planned}
        self.trainings = self.points | {rung.id: rung for own in self._rungs.values() for rung in own}
        self._keep, self._ledger = halving.keep, ledger
        self._through: list[set[str]] = [set() for _ in range(max(map(len, self._rungs.values()), default=0))]

    def turn(self, point: str) -> str:
        """The training of a point that is next, or that is waited for."""
        if self._ledger.state(point) != "done":
            for level, rung in enumerate(self._rungs[point]):
                if point not in self._through[level]:
                    return rung.id
        return point

    def compare(self) -> None:
        """Once all trainings of a rung have ended, ends the points that it leaves behind."""
        among = list(self.points)
        for level, through in enumerate(self._through):
            at = {point: own[level] for point in among if len(own := self._rungs[point]) > level}
            states = {point: self._state(rung) for point, rung in at.items()}
            if {"pending", "leased"} & set(states.values()):
                return
            fvu = {p: self._fvu(rung) for p, rung in at.items() if states[p] == "done"}
            order = sorted(fvu, key=best(fvu, 1.0).index)
            through |= set(best(fvu, self._keep)) | {point for point in fvu if self._went_on(point, level)}
            through |= set(among) - at.keys()
            for place, point in enumerate(order):
                if point not in through:
                    self._stop(point, at[point], f"place {place + 1} of {len(fvu)} by held-out FVU")
            for point in states.keys() - fvu.keys():
                self._fail(point, at[point])
            among = [point for point in among if point in through]

    def seconds(self, training: str, own: float) -> float:
        """Of a training that took `own` seconds, and, if it is a whole one, of the rungs before it."""
        before = [end.seconds or 0 for rung in self._rungs.get(training, []) for end in self._ledger.ends(rung.id)]
        return own + sum(before)

    def _went_on(self, point: str, level: int) -> bool:
        """Whether the point was found good enough before there were as many points as now."""
        later = [*self._rungs[point][level + 1 :], self.points[point]]
        stopped = any(end.stopped_at is not None for end in self._ledger.ends(point))
        return not stopped and self._ledger.tries(later[0].id) > 0

    def _state(self, rung: Planned) -> State:
        """As in the ledger; a rung whose folder somebody removed is trained again."""
        state = self._ledger.state(rung.id)
        gone = state == "done" and not (Path(str(rung.config.out)) / "summary.json").exists()
        return "pending" if gone else state

    def _fvu(self, rung: Planned) -> float | None:
        figures: Mapping[str, object] = read_summary(Path(str(rung.config.out)))["eval"]
        fvu = figures["fvu"]
        return fvu if isinstance(fvu, float) else None

    def _stop(self, point: str, rung: Planned, why: str) -> None:
        """The point ends as what it was at this rung."""
        if self._ledger.state(point) == "done" or (taken := self._ledger.take(point, together=1)) is None:
            return
        adopt(rung.config, Path(str(self.points[point].config.out)))
        steps, end = rung.config.train.n_steps, self._ledger.ends(rung.id)[-1]
        logger.info("point %s stops after %d steps: %s", point, steps, why)
        self._ledger.end(
            taken, "done", seconds=self.seconds(point, 0.0), cost=end.cost, stopped_at=steps, stopped_why=why
        )  # fmt: skip

    def _fail(self, point: str, rung: Planned) -> None:
        if self._ledger.state(point) == "pending" and (taken := self._ledger.take(point, together=1)) is not None:
            self._ledger.end(taken, "failed", failure=self._ledger.ends(rung.id)[-1].failure)
