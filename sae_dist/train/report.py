"""What rank 0 tells the log of a training: a line of figures now and then, and alerts at once."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sae_dist.monitor.metrics import Log
from sae_dist.shards import shuffle
from sae_dist.train.figures import Window, figures, rates
from sae_dist.train.learner import Learned
from sae_dist.train.parallel.feed import Fed, Feed
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.state import TrainState
from sae_dist.train.task import Task

logger = logging.getLogger(__name__)


class Report:
    """Sums over the steps since the last line. All ranks call it at the same steps: figures are the whole mesh's."""

    def __init__(self, task: Task, mesh: Mesh, begun: TrainState, *, log: Log) -> None:
        """`begun` is the state that this attempt began with."""
        self._task, self._mesh, self._begun, self._log = task, mesh, begun, log
        self._windows = [Window() for _ in task.members]

    def add(
        self, state: TrainState, learned: Sequence[Learned], batch: Fed, feed: Feed, *, lr_factor: float,
        more: Callable[[], dict[str, Any]],
    ) -> None:  # fmt: skip
        """Counts a step, after which the state is `state`; writes a line when one is due. `more` figures go with it."""
        task = self._task
        self._windows = [w.add(one, task.config.batch) for w, one in zip(self._windows, learned, strict=True)]
        alerts = {one.learner.member: f"step {state.step}: {one.alert}" for one in learned if one.alert}
        if alerts or state.step % task.config.log_every == 0 or state.step == task.config.n_steps:
            line = {"epoch": batch.epoch} | rates(state, self._begun, task.config.batch, feed.starved_s(), self._mesh)
            for window, own in zip(self._windows, state.learners, strict=True):
                line |= figures(window, own, state, lr=own.member.peak_lr * lr_factor, tokens=line["tokens"])
            line |= {f"{member.prefix}alert": alert for member, alert in alerts.items()}
            line |= {"shuffle_inflation": shuffle.inflation(batch.docs().numpy())}  # at best 1 + batch m / rows
            self._windows = [Window() for _ in task.members]
            if self._mesh.first:
                self._log(state.step, line | more())
        if self._mesh.first:
            for member, alert in alerts.items():
                logger.error("ALERT: %s%s", task.named(member), alert)
