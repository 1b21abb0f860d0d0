"""The run on one page: rows in their order, a step a batch, a checkpoint now and then, dictionaries at the end.

All dictionaries of a run learn from the same batches, which are read, moved and cast once (member.py). Every rank of a
mesh runs this page, and they do the same at the same time. Rank 0 does whatever must happen once.
"""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch

from sae_dist import faults
from sae_dist.config import Stopped
from sae_dist.monitor import Log
from sae_dist.train.batches import Batches
from sae_dist.train.consumer import Consumer, consumer_name
from sae_dist.train.finish import write_dictionary
from sae_dist.train.learner import check, learn
from sae_dist.train.parallel.checkpoint import Checkpoints
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.report import Report
from sae_dist.train.resume import resume
from sae_dist.train.retention import Retention
from sae_dist.train.roll_back import roll_back
from sae_dist.train.saver import Saver
from sae_dist.train.schedule import lr_factor
from sae_dist.train.state import TrainState, to_checkpoint
from sae_dist.train.task import Task

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What a finished training says besides the dictionaries' folders."""

    steps: int
    tokens: int
    order_hash: str
    seconds: float  # of training, over all attempts


def train(
    task: Task,
    mesh: Mesh | None = None,
    *,
    log: Log,
    stop: Callable[[], bool] = lambda: False,
    at: Callable[[int, str], None] = lambda *_: None,
) -> Trained:
    """Trains the task's dictionaries and writes them into its folder; resumes at the newest checkpoint.

    A dictionary is a function of the store, its member, the config, the order, the seed (of the order) and the kernels:
    a run that was stopped, or killed, and repeated on the same machine and mesh ends in the same one, and so does a run
    of that member alone. Raises `Stopped`, after a checkpoint, once `stop()` is true on any rank, and `UserError` when
    a member's guard gives up. `at` is told where this rank is; `log` is called on rank 0 alone.
    """
    mesh, config = mesh or Mesh.single(), task.config
    for member in task.members:
        check(member, task.d_model, mesh)
    checkpoints = Checkpoints(mesh, task.checkpoints, timeout_s=task.checkpoint_timeout_s)
    batches = Batches(task, mesh, stop)
    if mesh.first:
        _warn_of_slow_states(task)
    at(0, "reading")
    state, folder = resume(batches, checkpoints)
    reports_to = task.store.storage if task.live and mesh.first else None
    consumer = Consumer(reports_to, consumer_name(task.out), taken=state.units_done, saved=0)
    if state.step < config.n_steps:
        report, began, before = Report(task, mesh, state, log=log), time.monotonic(), state.seconds
        saver = Saver(
            checkpoints.storage, Retention(config.keep_checkpoints, config.keep_every), write=checkpoints.save,
            leads=mesh.first, resumed_from=folder, tell=lambda kept: consumer.save(kept[0].facts["units_done"]),
        )  # fmt: skip
        stopping = False
        with closing(saver), batches.after(state) as feed:
            at(state.step, "training")
            while (batch := feed.next(stop=stopping)) is not None:
                factor = lr_factor(state.step, config)
                x = batch.x.float() * state.scale
                learned = [
                    learn(one, config, x, lr=one.member.peak_lr * factor, variance=state.variance)
                    for one in state.learners
                ]
                state = state._replace(
                    step=state.step + 1, learners=tuple(one.learner for one in learned), order_hash=batch.order_hash,
                    units_done=batch.units_done, seconds=before + time.monotonic() - began,
                )  # fmt: skip
                at(state.step, "training")
                if any(one.decision in ("roll_back", "stop") for one in learned):
                    saver.wait()  # what is being saved may be what to go back to
                    state = roll_back(learned, state, batches, checkpoints)
                consumer.take(state.units_done, starved_s=feed.starved_s())
                report.add(state, learned, batch, feed, lr_factor=factor, more=saver.figures)
                if state.step == config.n_steps:
                    break
                faults.point("train.step", step=state.step, rank=mesh.world.rank)
                # not amid steps that are left out: those before them are what it may have to go back to
                if state.step % config.checkpoint_every == 0 and not any(one.guard.in_a_row for one in state.learners):
                    saver.save(to_checkpoint(state))
                else:
                    saver.poll()
                stopping = stop()
            at(state.step, "saving")
            saver.finish(to_checkpoint(state))  # done, or asked to stop, perhaps while no rows came
        if state.step < config.n_steps:
            raise Stopped(f"step {state.step} of {config.n_steps} is saved")
    if mesh.first:
        for learner in state.learners:
            write_dictionary(checkpoints.storage, task.out, learner, step=state.step, info=_info(task, state))
        consumer.sign_off()
    return Trained(state.step, state.step * config.batch, f"{state.order_hash:016x}", state.seconds)


def _warn_of_slow_states(task: Task) -> None:
    for member in task.members:
        if not member.state.plain:
            logger.warning(
                "%sparameters=%s moments=%s: plain torch computes such a state, slower than the kernels for float32",
                task.named(member), member.parameters, member.moments,
            )  # fmt: skip


def _info(task: Task, state: TrainState) -> dict[str, Any]:
    """What all dictionaries of the training say of where they come from."""
    return {
        "d_model": task.d_model,
        "subtract_b_dec": True,  # x - b_dec goes into the encoder
        "hook": task.hook,
        "tokens_trained": state.step * task.config.batch,
        "order_hash": f"{state.order_hash:016x}",
        "order_seed": task.seed,
        "torch": torch.__version__,
        "store_digest": task.store.meta.digest,
        **task.provenance,
    }
