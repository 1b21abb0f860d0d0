"""Rolling back: a dictionary whose guard says so takes the weights of its last sound checkpoint; the others continue.

A checkpoint is sound if it was saved at a regular step, no step was skipped just before it, and all its numbers are
finite. So the target does not depend on when the run was stopped, nor on other members. Training continues with later
rows: those since the checkpoint are not used again.
"""

import logging
from collections.abc import Sequence

import torch

from sae_dist.config import UserError
from sae_dist.train import guard as guards
from sae_dist.train.batches import Batches
from sae_dist.train.checkpoint_manifest import CheckpointManifest
from sae_dist.train.guard import GuardConfig
from sae_dist.train.learner import Learner, StepOutcome
from sae_dist.train.members import Member
from sae_dist.train.parallel.collectives import all_gather
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.mesh_checkpoints import Checkpoints
from sae_dist.train.state import TrainState, initial_state, local_tensors, owned_rows

logger = logging.getLogger(__name__)


def is_sound(manifest: CheckpointManifest, member: Member) -> bool:
    """Whether the member may roll back to this checkpoint; `judge_states` ensures that its numbers are finite."""
    guard = manifest.facts.get(f"{member.prefix}guard")
    return manifest.scheduled and isinstance(guard, dict) and guard.get("in_a_row") == 0


def judge_states(outcomes: Sequence[StepOutcome], config: GuardConfig, mesh: Mesh, *, last: bool) -> list[StepOutcome]:
    """The outcomes of a step before its checkpoint is saved: a dictionary with a number that is not finite rolls back.

    While its guard skips steps, the guard decides, unless this is the `last` step. All ranks call this together.
    """
    here = torch.stack([_is_finite(one.learner) for one in outcomes])
    finite = all_gather(mesh, mesh.control, here.to(torch.uint8), name="finite").bool().all(0).tolist()
    judged = []
    for one, sound in zip(outcomes, finite, strict=True):
        if not sound and (one.decision == "step" or last):
            verdict = guards.judge_state(one.learner.guard, config)
            one = one._replace(
                learner=one.learner._replace(guard=verdict.guard), decision=verdict.decision, alert=verdict.alert
            )
        judged.append(one)
    return judged


def roll_back(
    outcomes: Sequence[StepOutcome], state: TrainState, batches: Batches, checkpoints: Checkpoints
) -> TrainState:
    """`state` after the guards' decisions on its last step; UserError once one has rolled back too often."""
    task = batches.task
    if given_up := [one for one in outcomes if one.decision == "stop"]:
        cure = given_up[0].cure(state.step, n_steps=task.config.n_steps)
        raise UserError(f"{task.named(given_up[0].learner.member)}{cure}")
    return state._replace(
        learners=tuple(
            _earlier(one.learner, state, batches, checkpoints) if one.decision == "roll_back" else one.learner
            for one in outcomes
        )
    )


def _earlier(learner: Learner, state: TrainState, batches: Batches, checkpoints: Checkpoints) -> Learner:
    """The learner with the weights of its last sound checkpoint, else with its initial ones.

    Checkpoints of later steps do not count; a run that resumed before a damaged one may find some.
    """
    task, mesh, member = batches.task, batches.mesh, learner.member
    earlier = checkpoints.latest(
        owned_rows(mesh, task.members, member),
        accept=lambda manifest: manifest.step < state.step and is_sound(manifest, member),
    )
    if mesh.is_rank_0:
        to = f"step {earlier.step}" if earlier is not None else "the start: no checkpoint is from before the trouble"
        logger.warning("%sgoing back to %s", task.named(member), to)
    if earlier is None:
        x, target = batches.sample(state.source.manifest)
        begun = initial_state(
            x, target, [member], task.config, mesh, source=state.source, sides=task.sides, model=task.store.meta.model
        )
        return learner._replace(sae=begun.learners[0].sae)
    learner.sae.load_state_dict_(local_tensors(earlier, member))
    return learner


def _is_finite(learner: Learner) -> torch.Tensor:
    """Whether all weights and moments on this rank are finite; one pass, without a copy."""
    floats = [tensor for tensor in learner.sae.state_dict().values() if tensor.is_floating_point() and tensor.numel()]
    ends = torch.stack([end.double().cpu() for tensor in floats for end in torch.aminmax(tensor)])
    return ends.isfinite().all()
