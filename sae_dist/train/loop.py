"""The training loop: rows in their order, one step a batch, regular checkpoints, dictionaries at the end.

All dictionaries of a run learn from the same batches, which are read, moved and cast once (members.py). Every rank of a
mesh runs this code in lockstep. Rank 0 does whatever must happen once.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import torch

from sae_dist import faults
from sae_dist.config import Stopped
from sae_dist.monitor.metrics import Log
from sae_dist.shards import lease as leases
from sae_dist.shards.hooks import sides
from sae_dist.shards.lease import Lease
from sae_dist.train.batches import Batches
from sae_dist.train.config import TrainConfig
from sae_dist.train.consumer import Consumer, consumer_name
from sae_dist.train.learner import Learner, check_member, train_step
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.mesh_checkpoints import Checkpoints
from sae_dist.train.report import Report
from sae_dist.train.resume import StartPoint, resume
from sae_dist.train.retention import Retention
from sae_dist.train.roll_back import is_sound, judge_states, roll_back
from sae_dist.train.saver import Saver
from sae_dist.train.schedule import lr_factor
from sae_dist.train.state import TrainState, to_checkpoint
from sae_dist.train.task import Task
from sae_dist.train.write_dictionary import write_dictionary

logger = logging.getLogger(__name__)

CHECKPOINTS_KEY = "train.checkpoints"


class Trained(NamedTuple):
    """The result of a finished training, besides the dictionaries' folders."""

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
    set_phase: Callable[[int, str], None] = lambda *_: None,
) -> Trained:
    """Trains the task's dictionaries and writes them into its folder; resumes at the newest checkpoint.

    A dictionary is a function of the store, its member, the config, the order, its seed and the kernels: a run that was
    stopped or killed and repeated on the same machine and mesh gives the same dictionary, and so does a run of that
    member alone. Once `stop()` is true on any rank, saves a checkpoint and raises Stopped. UserError when a member's
    guard stops it. `set_phase(step, phase)` says what this rank does; `log` is called on rank 0 only.
    """
    mesh, n_steps = mesh or Mesh.single(), task.config.n_steps
    for member in task.members:
        check_member(member, task.sides[-1], mesh)
    with ExitStack() as held:
        place, lease = task.checkpoints, None
        if mesh.is_rank_0:
            lease = held.enter_context(leases.lease(place, str(task.out), key=CHECKPOINTS_KEY, folder="lease"))
        batches = Batches(task, mesh, stop)
        checkpoints = Checkpoints(mesh, place, task.run_id, timeout_s=task.checkpoint_timeout_s)
        set_phase(0, "reading")
        start = resume(batches, checkpoints)
        if mesh.is_rank_0:
            _warn_of_slow_states(task, start.state.learners)
        state, told = start.state, task.store.storage if task.live and mesh.is_rank_0 else None
        consumer = held.enter_context(closing(Consumer(told, consumer_name(task.out), taken=state.units_done)))
        if state.step < n_steps:
            state = _take_steps(start, batches, checkpoints, consumer, lease, log=log, set_phase=set_phase)
        if state.step < n_steps:
            raise Stopped(f"step {state.step} of {n_steps} is saved")
        if mesh.is_rank_0:
            for learner in state.learners:
                write_dictionary(place, task.run_id, task.out, learner, step=n_steps, info=_info(task, state))
            consumer.sign_off()
    return Trained(n_steps, n_steps * task.config.batch, f"{state.order_hash:016x}", state.seconds)


def _take_steps(
    start: StartPoint,
    batches: Batches,
    checkpoints: Checkpoints,
    consumer: Consumer,
    lease: Lease | None,
    *,
    log: Log,
    set_phase: Callable[[int, str], None],
) -> TrainState:
    """Takes all remaining steps, or fewer if a rank is asked to stop; returns the state after them, which is saved."""
    task, mesh, config, state = batches.task, batches.mesh, batches.task.config, start.state
    report, started, stopping = Report(task, mesh, state, log=log), time.monotonic(), False
    fits = [functools.partial(is_sound, member=member) for member in task.members]
    saver = Saver(
        checkpoints.storage, task.run_id, Retention(config.keep_checkpoints, config.keep_every, fits),
        write=checkpoints.save, is_rank_0=mesh.is_rank_0, resumed_from=start.folder,
        tell=lambda kept: consumer.save(kept[0].facts["units_done"]),
    )  # fmt: skip
    with closing(saver), batches.after(state) as feed:
        set_phase(state.step, "training")
        while (batch := feed.next(stop=stopping)) is not None:
            factor, x = lr_factor(state.step, config), state.scales.x.of(batch.x.float())
            target = x if batch.target is batch.x else state.scales.target.of(batch.target.float())
            step, last = state.step + 1, state.step + 1 == config.n_steps
            outcomes = [
                train_step(
                    one, config, x, target=target, lr=one.member.peak_lr(config.n_steps) * factor,
                    variance=state.variance, progress=state.step / config.n_steps, measure=report.is_due(step),
                    resample=step in config.resample_after,
                )
                for one in state.learners
            ]  # fmt: skip
            if _is_due(step, config):
                outcomes = judge_states(outcomes, config.guard, mesh, last=last)
            state = state._replace(
                step=step, learners=tuple(one.learner for one in outcomes), order_hash=batch.order_hash,
                units_done=batch.units_done, seconds=start.state.seconds + time.monotonic() - started,
            )  # fmt: skip
            set_phase(step, "training")
            if any(one.decision in ("roll_back", "stop") for one in outcomes):
                saver.wait()  # the save in progress may be the one to roll back to
                state = roll_back(outcomes, state, batches, checkpoints)
            consumer.take(state.units_done, starved_s=feed.starved_s())
            report.add(state, outcomes, batch, feed, lr_factor=factor, more=saver.figures)
            if last:
                break
            faults.point("train.step", step=step, rank=mesh.world.rank)
            if lease is not None:
                lease.check()
            if _is_due(step, config):
                saver.save(to_checkpoint(state))
            saver.poll()
            stopping = batches.stop()
        set_phase(state.step, "saving")  # done, or asked to stop, perhaps while no rows came
        saver.finish(to_checkpoint(state)._replace(scheduled=_is_due(state.step, config)))
    return state


def _is_due(step: int, config: TrainConfig) -> bool:
    """Whether this step is saved regularly; only such checkpoints are rolled back to, whenever the run was stopped."""
    return step % config.checkpoint_every == 0 or step == config.n_steps


def _warn_of_slow_states(task: Task, learners: Iterable[Learner]) -> None:
    for learner in learners:
        member = learner.member
        if not member.state.plain and learner.sae.shard.backend_used == "torch":
            logger.warning(
                "%sparameters=%s moments=%s: computed by plain torch, slower than the kernels",
                task.named(member), member.parameters, member.moments,
            )  # fmt: skip


def _info(task: Task, state: TrainState) -> dict[str, Any]:
    """The provenance that all dictionaries of the training share."""
    return {
        **sides(task.hooks, task.store.meta),
        "subtract_b_dec": task.hooks.rebuilds_input,  # the encoder reads x - b_dec; of a transcoder x - b_in
        "tokens_trained": state.step * task.config.batch,
        "order_hash": f"{state.order_hash:016x}",
        "order_seed": task.seed,
        "torch": torch.__version__,
        "store_digest": task.store.meta.digest,
        **task.provenance,
    }
