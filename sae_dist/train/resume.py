"""Where a training begins: at its newest checkpoint, else with untrained dictionaries."""

import logging

from sae_dist.config import UserError
from sae_dist.train.batches import Batches
from sae_dist.train.parallel.checkpoint import Checkpoints
from sae_dist.train.parallel.exchange import of_first
from sae_dist.train.state import TrainState, begin, from_checkpoint, mine

logger = logging.getLogger(__name__)


def resume(batches: Batches, checkpoints: Checkpoints) -> tuple[TrainState, str]:
    """The state to train on from, and the folder of the checkpoint that it was read from ("" without one).

    UserError when the checkpoints are of another training.
    """
    task, mesh = batches.task, batches.mesh
    saved = checkpoints.latest(mine(mesh))
    if saved is None:
        manifest = None
        if not task.live:
            manifest = of_first(mesh, task.store.snapshot().version if mesh.first else 0, name="manifest")
        x = batches.sample(manifest)
        return begin(x, task.members, task.config, mesh, source=task.source(manifest)), ""
    state = from_checkpoint(saved, task.members, task.config, mesh)
    here, there = task.source(None), state.source
    if (there.store, there.hook) != (here.store, here.hook):
        raise UserError(
            f"out={task.out} was trained on {there.hook} of store {there.store}, not on {here.hook} of {here.store} "
            f"({task.store.storage.uri}); choose another out="
        )
    if there.run != here.run:
        raise UserError(
            f"train.checkpoints={checkpoints.storage.uri} holds another run's checkpoints; give each run a place of "
            "its own"
        )
    if mesh.first:
        logger.info("resuming at step %d of %d", state.step, task.config.n_steps)
    return state, saved.folder
