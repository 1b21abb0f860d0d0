"""The log of a training, written by rank 0: a line of metrics at regular steps, and alerts at once."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sae_dist.monitor.metrics import Log
from sae_dist.shards import shuffle
from sae_dist.train.learner import StepOutcome
from sae_dist.train.log_metrics import IntervalSums, dictionary_metrics, machine, run_metrics
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.mesh_loader import GlobalBatch, MeshLoader
from sae_dist.train.state import TrainState
from sae_dist.train.task import Task

logger = logging.getLogger(__name__)


class Report:
    """Collects metrics between log lines. All ranks call it at the same steps, since metrics are of the whole mesh."""

    def __init__(self, task: Task, mesh: Mesh, start: TrainState, *, log: Log) -> None:
        """`start` is the state at the start of this attempt."""
        self._task, self._mesh, self._start, self._log = task, mesh, start, log
        self._sums = [IntervalSums() for _ in task.members]

    def is_due(self, step: int) -> bool:
        """Whether a line of this step is written in any case."""
        return step % self._task.config.log_every == 0 or step == self._task.config.n_steps

    def add(
        self, state: TrainState, outcomes: Sequence[StepOutcome], batch: GlobalBatch, loader: MeshLoader, *,
        lr_factor: float, more: Callable[[], dict[str, Any]],
    ) -> None:  # fmt: skip
        """Counts a step that led to `state`; writes a line when one is due, with the metrics of `more()` added."""
        task, n_steps = self._task, self._task.config.n_steps
        self._sums = [w.add(one, task.config.batch) for w, one in zip(self._sums, outcomes, strict=True)]
        alerts = {one.learner.member: f"step {state.step}: {one.alert}" for one in outcomes if one.alert}
        if alerts or self.is_due(state.step):
            starved_s = loader.starved_s()
            line = {"epoch": batch.epoch} | run_metrics(state, self._start, task.config.batch, starved_s, self._mesh)
            for sums, own in zip(self._sums, state.learners, strict=True):
                lr = own.member.peak_lr(n_steps) * lr_factor
                line |= dictionary_metrics(sums, own, state, lr=lr, tokens=line["tokens"])
            line |= {f"{member.prefix}alert": alert for member, alert in alerts.items()}
            line |= {"shuffle_inflation": shuffle.inflation(batch.docs().numpy())}  # at best 1 + batch m / rows
            line |= {"x_norm": float(batch.x.float().norm(dim=1).mean())}  # in the units of the store
            line |= machine(self._mesh.device)
            self._sums = [IntervalSums() for _ in task.members]
            if self._mesh.is_rank_0:
                seconds, saving = max(state.seconds - self._start.seconds, 1e-9), more()
                blocked = saving["checkpoint_wait_seconds"] / seconds  # the share of its time that it waited for saves
                self._log(state.step, line | saving | {"blocked_fraction": blocked})
        if self._mesh.is_rank_0:
            for member, alert in alerts.items():
                logger.error("ALERT: %s%s", task.named(member), alert)
