"""One dictionary in training, and its step on a batch."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.sae.config import check_sites, check_width
from sae_dist.train import norms
from sae_dist.train.config import TrainConfig
from sae_dist.train.guard import Decision, Guard, judge
from sae_dist.train.members import MAIN, Member
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.resample import resample_
from sae_dist.train.parallel.step import MeshStep
from sae_dist.train.warm_start import StartedFrom


class Learner(NamedTuple):
    """One dictionary in training; its state does not depend on other members."""

    member: Member
    sae: MeshStep
    guard: Guard
    started_from: StartedFrom | None = None  # where it did not begin at random


class StepOutcome(NamedTuple):
    """The result of one batch."""

    learner: Learner  # with the guard after it
    decision: Decision
    alert: str | None
    squared_error: float
    active: float
    fired: Int[Tensor, " here"]  # rows of the batch on which each latent of this rank was active
    gradient_norm: float | None  # if it was asked for, and the step was taken

    def cure(self, step: int, *, n_steps: int) -> str:
        """The message when the guard stops this dictionary at `step` of `n_steps`."""
        member = self.learner.member
        rate = "train.lr" if member.name == MAIN else "its lr"
        return f"{self.alert}, up to step {step}; lower {rate}={member.peak_lr(n_steps):g}, in another out="


def check_member(member: Member, rebuilt: Mapping[str, int], mesh: Mesh) -> None:
    """UserError where a dictionary does not fit this mesh, or the widths of the hook points that it rebuilds."""
    try:
        check_width(member.sae, sum(rebuilt.values()))
        check_sites(member.sae, rebuilt)
        mesh.latents(member.sae.n_latents)
    except UserError as error:
        if member.name == MAIN:
            raise
        raise UserError(f"more_dictionaries={member.name}: {error}") from None


def train_step(
    learner: Learner, config: TrainConfig, x: Float[Tensor, "batch d_in"], *,
    target: Float[Tensor, "batch d_out"], lr: float, variance: float, progress: float, measure: bool = False,
    resample: bool = False,
) -> StepOutcome:  # fmt: skip
    """One step, unless the learner's guard skips it; all ranks call this together.

    `progress`: the share of all steps that were taken before. With `resample`, dead latents begin anew after it. With
    `measure`, the norm of the gradient is found too.
    """
    sae, norm = learner.sae, None
    said = sae.forward(x, target, variance=variance, progress=progress)
    squared_error = float(said.squared_error)
    unit = len(x) * variance
    verdict = judge(
        learner.guard, config.guard, loss=squared_error / unit, aux_loss=float(said.aux_squared_error) / unit,
        finite=sae.gradients_are_finite(said),
    )  # fmt: skip
    if verdict.decision == "step":
        before = norms.moments(sae) if measure else None
        _update_(learner, lr)
        if before is not None:
            norm = norms.gradient_norm(sae, before)
        sae.count_(said.fired, tokens=len(x))
        if resample and learner.member.frozen == "nothing":
            resample_(sae, x, target, seed=learner.member.seed)
    else:
        sae.skip_()
    return StepOutcome(
        learner._replace(guard=verdict.guard), verdict.decision, verdict.alert, squared_error, float(said.active),
        said.fired, norm,
    )  # fmt: skip


def _update_(learner: Learner, lr: float) -> None:
    """The update, except of what is frozen."""
    sae, frozen = learner.sae, learner.member.frozen
    if frozen == "all":
        sae.track_()  # of the kinds that choose over a batch: without its threshold, half of all latents are active
        sae.skip_()
        return
    kept = sae.shard.W_dec.clone() if frozen == "decoder" else None
    sae.update_(lr=lr)
    if kept is not None:
        sae.shard.W_dec.copy_(kept)
