"""The batches of a training, starting at any step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist.config import Stopped
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.mesh_loader import MeshLoader
from sae_dist.train.state import TrainState
from sae_dist.train.task import Task


class Batches(NamedTuple):
    """Opens the task's rows in their order on this rank; reading ends early once `stop()` is true."""

    task: Task
    mesh: Mesh
    stop: Callable[[], bool]

    def after(self, state: TrainState) -> MeshLoader:
        """The batches that follow `state`; use it in a `with`."""
        return self._feed(state.step, state.order_hash, state.source.manifest, until=self.task.config.n_steps)

    def sample(self, manifest: int | None) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_out"] | None]:
        """The first rows in the order of training, fp32, as many as a dictionary begins from, and their targets.

        No targets where they are the same rows. Raises Stopped where `stop()` becomes true before they are read.
        """
        x, target, alike = list[Tensor](), list[Tensor](), self.task.hooks.rebuilds_input
        n_rows, batch = self.task.init_rows, self.task.config.batch
        with self._feed(0, 0, manifest, until=-(-n_rows // batch)) as feed:
            while sum(map(len, x)) < n_rows:
                if (fed := feed.next()) is None:
                    raise Stopped("nothing was trained yet")
                x.append(fed.x.float().clone())
                if not alike:
                    target.append(fed.target.float().clone())
        return torch.cat(x)[:n_rows], None if alike else torch.cat(target)[:n_rows]

    def _feed(self, step: int, order_hash: int, manifest: int | None, *, until: int) -> MeshLoader:
        task = self.task
        return MeshLoader(
            self.mesh, task.store, task.hooks, batch=task.config.batch, seed=task.seed, order=task.order,
            start_step=step, order_hash=order_hash, live=task.live,
            manifest=None if manifest is None else task.store.pinned(manifest, task.checkpoints), stop=self.stop,
            stop_step=until,
        )  # fmt: skip
