"""Going back: a dictionary whose guard says so takes the weights of its last sound checkpoint; the others go on.

The rows since then are not trained on again. The result is not saved at once: a run that is killed here and repeated
comes to the same step, and goes back to the same checkpoint.
"""

import logging
from collections.abc import Sequence

from sae_dist.config import UserError
from sae_dist.train.batches import Batches
from sae_dist.train.learner import Learned, Learner
from sae_dist.train.parallel.checkpoint import Checkpoints
from sae_dist.train.state import TrainState, begin, local, mine

logger = logging.getLogger(__name__)


def roll_back(learned: Sequence[Learned], state: TrainState, batches: Batches, checkpoints: Checkpoints) -> TrainState:
    """`state` with what the guards decided on its last step; UserError once one has gone back too often."""
    task = batches.task
    if given_up := [one for one in learned if one.decision == "stop"]:
        raise UserError(f"{task.named(given_up[0].learner.member)}{given_up[0].cure(state.step)}")
    return state._replace(
        learners=tuple(
            _earlier(one.learner, state, batches, checkpoints) if one.decision == "roll_back" else one.learner
            for one in learned
        )
    )


def _earlier(learner: Learner, state: TrainState, batches: Batches, checkpoints: Checkpoints) -> Learner:
    """The learner with the weights of its last checkpoint before the trouble, else with those that it began with."""
    task, mesh, member = batches.task, batches.mesh, learner.member
    earlier = checkpoints.latest(
        mine(mesh, member), among=lambda manifest: not manifest.facts[f"{member.prefix}guard"]["in_a_row"]
    )
    if mesh.first:
        to = f"step {earlier.step}" if earlier is not None else "the start: no checkpoint is from before the trouble"
        logger.warning("%sgoing back to %s", task.named(member), to)
    if earlier is None:
        x = batches.sample(state.source.manifest)
        return learner._replace(sae=begin(x, [member], task.config, mesh, source=state.source).learners[0].sae)
    learner.sae.load_state_dict_(local(earlier, member))
    return learner
