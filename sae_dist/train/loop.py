"""The run on one page: rows in their order, a step a batch, a checkpoint now and then, dictionaries at the end.

All dictionaries of a run learn from the same batches, which are read, moved and cast once (member.py). Every rank of a
mesh runs this page, and they do the same at the same time. What there is one of, the first rank does.
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist import faults, storage
from sae_dist.config import Stopped, UserError
from sae_dist.monitor import Log
from sae_dist.shards import shuffle
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.reader import Store
from sae_dist.train.checkpoint import Manifest
from sae_dist.train.config import TrainConfig
from sae_dist.train.consumer import Consumer, consumer_name
from sae_dist.train.figures import Window, figures, rates
from sae_dist.train.finish import write_dictionary
from sae_dist.train.learner import Learner, check, learn
from sae_dist.train.member import Member
from sae_dist.train.parallel import checkpoint
from sae_dist.train.parallel.exchange import of_first
from sae_dist.train.parallel.feed import Feed
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.retention import Retention
from sae_dist.train.saver import Saver
from sae_dist.train.schedule import lr_factor
from sae_dist.train.state import Source, TrainState, begin, from_checkpoint, local, mine, to_checkpoint

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What a finished training says besides the dictionaries' folders."""

    steps: int
    tokens: int
    order_hash: str
    seconds: float  # of training, over all attempts


def train(
    store: Store,
    *,
    hook: str,
    members: Sequence[Member],
    config: TrainConfig,
    order: OrderConfig,
    seed: int,
    out: Path,
    log: Log,
    mesh: Mesh | None = None,
    checkpoint_timeout_s: float = 1800.0,
    live: bool = False,
    provenance: Mapping[str, Any],
    stop: Callable[[], bool] = lambda: False,
    at: Callable[[int, str], None] = lambda *_: None,
) -> Trained:
    """Trains the members on the store's rows and writes their dictionaries; goes on from the newest checkpoint.

    A dictionary is a function of the store, its member, the config, the order, the seed (of the order) and the kernels:
    a run that was stopped, or killed, and repeated on the same machine and mesh ends in the same one, and so does a run
    of that member alone. A `live` store may still be growing; otherwise its manifest is pinned. Raises `Stopped`, after
    a checkpoint, once `stop()` is true on any rank, and `UserError` when a member's guard gives up. `at` is told where
    this rank is; `log` is called on the first rank alone.
    """
    mesh = mesh or Mesh.single()
    d_model = store.meta.hooks[hook]
    for member in members:
        check(member, d_model, mesh)
    n_steps = config.n_steps
    group = checkpoint.group_of(mesh, checkpoint_timeout_s)

    def feed(step: int, order_hash: int, manifest: int | None, until: int) -> Feed:
        return Feed(
            mesh, store, hook, batch=config.batch, seed=seed, order=order, start_step=step, order_hash=order_hash,
            live=live, manifest=None if manifest is None else store.pinned(manifest), stop=stop,
            stop_step=until,
        )  # fmt: skip

    def fresh(source: Source, members: Sequence[Member]) -> TrainState:
        x = _sample(feed(0, 0, source.manifest, -(-config.init_rows // config.batch)), config.init_rows)
        return begin(x, members, config, mesh, source=source)

    def tell(kept: list[Manifest]) -> None:
        if len(kept) == config.keep_checkpoints:  # else a damaged one would lead back to the start
            consumer.save(kept[0].facts["units_done"])

    checkpoints = storage.open(config.checkpoints or out / "checkpoints")
    at(0, "reading")
    saved, run = checkpoint.latest(group, checkpoints, mine(mesh)), provenance.get("config_hash")
    if saved is None:
        version = None if live else of_first(mesh, store.snapshot().version if mesh.first else 0, name="manifest")
        state = fresh(Source(store.meta.digest, hook, version, run), members)
    else:
        state = from_checkpoint(saved, members, config, mesh)
        if state.source[:2] != (store.meta.digest, hook):
            raise UserError(
                f"out={out} was trained on {state.source.hook} of store {state.source.store}, not on {hook} of "
                f"{store.meta.digest} ({store.storage.uri}); choose another out="
            )
        if state.source.run != run:
            raise UserError(
                f"train.checkpoints={checkpoints.uri} holds another run's checkpoints; give each run a place of its own"
            )
        if mesh.first:
            logger.info("going on from step %d of %d", state.step, n_steps)
    went_on_from = "" if saved is None else saved.folder
    del saved

    def named(member: Member) -> str:
        return f"{member.name}: " if len(members) > 1 else ""

    for member in members if mesh.first else ():
        if not member.state.plain:
            logger.warning(
                "%sparameters=%s moments=%s: plain torch computes such a state, slower than the kernels for float32",
                named(member), member.parameters, member.moments,
            )  # fmt: skip

    def back(learner: Learner) -> Learner:
        """Its weights of the last checkpoint that it learned before; the rows since then are not trained on again.

        That is not saved at once: a run repeated from there comes to the same step, and goes back to the same again.
        """
        member = learner.member
        earlier = checkpoint.latest(
            group, checkpoints, mine(mesh, member),
            among=lambda manifest: not manifest.facts[f"{member.prefix}guard"]["in_a_row"],
        )  # fmt: skip
        if mesh.first:
            to = (
                f"step {earlier.step}" if earlier is not None else "the start: no checkpoint is from before the trouble"
            )
            logger.warning("%sgoing back to %s", named(member), to)
        if earlier is None:
            return learner._replace(sae=fresh(state.source, [member]).learners[0].sae)
        learner.sae.load_state_dict_(local(earlier, member))
        return learner

    consumer = Consumer(
        store.storage if live and mesh.first else None, consumer_name(out), taken=state.units_done, saved=0
    )
    if state.step < n_steps:
        begun, started, windows = state, time.monotonic(), [Window() for _ in members]
        retention = Retention(config.keep_checkpoints, config.keep_every)
        write, stopping = functools.partial(checkpoint.save, group), False
        with (
            closing(Saver(checkpoints, retention, write=write, leads=mesh.first, went_on_from=went_on_from)) as saver,
            feed(state.step, state.order_hash, state.source.manifest, n_steps) as batches,
        ):
            at(state.step, "training")
            while (batch := batches.next(stop=stopping)) is not None:
                factor = lr_factor(
                    state.step, n_steps=n_steps, warmup_fraction=config.warmup_fraction,
                    decay_fraction=config.decay_fraction,
                )  # fmt: skip
                x = batch.x.float() * state.scale
                learned = [
                    learn(own, config, x, lr=own.member.peak_lr * factor, variance=state.variance)
                    for own in state.learners
                ]
                windows = [window.add(own, len(x)) for window, own in zip(windows, learned, strict=True)]
                state = state._replace(
                    step=state.step + 1, learners=tuple(own.learner for own in learned), order_hash=batch.order_hash,
                    units_done=batch.units_done, seconds=begun.seconds + time.monotonic() - started,
                )  # fmt: skip
                at(state.step, "training")
                alerts = {own.learner.member: f"step {state.step}: {own.alert}" for own in learned if own.alert}
                if given_up := [own for own in learned if own.decision == "stop"]:
                    raise UserError(f"{named(given_up[0].learner.member)}{given_up[0].cure(state.step)}")
                if any(own.decision == "roll_back" for own in learned):  # the others go on from where they are
                    tell(saver.wait())
                    learners = [back(own.learner) if own.decision == "roll_back" else own.learner for own in learned]
                    state = state._replace(learners=tuple(learners))
                consumer.take(state.units_done, starved_s=batches.starved_s())
                done = state.step == n_steps
                if done or alerts or state.step % config.log_every == 0:
                    line = {"epoch": batch.epoch} | rates(state, begun, config.batch, batches.starved_s(), mesh)
                    for window, own in zip(windows, state.learners, strict=True):
                        line |= figures(window, own, state, lr=own.member.peak_lr * factor)
                    line |= {f"{m.prefix}alert": alert for m, alert in alerts.items()}
                    line |= {"shuffle_inflation": shuffle.inflation(batch.docs().numpy())}  # at best 1 + batch m / rows
                    windows = [Window() for _ in members]
                    if mesh.first:
                        log(state.step, line | saver.figures())
                if mesh.first:
                    for member, alert in alerts.items():
                        logger.error("ALERT: %s%s", named(member), alert)
                if done:
                    break
                faults.point("train.step", step=state.step, rank=mesh.world.rank)
                # not amid steps that are left out: those before them are what it may have to go back to
                due = state.step % config.checkpoint_every == 0 and not any(
                    own.guard.in_a_row for own in state.learners
                )
                tell(saver.save(to_checkpoint(state)) if due else saver.poll())
                stopping = stop()
            at(state.step, "saving")
            tell(saver.finish(to_checkpoint(state)))  # done, or asked to stop, perhaps while no rows came
        if state.step < n_steps:
            raise Stopped(f"step {state.step} of {n_steps} is saved")

    order_hash = f"{state.order_hash:016x}"
    if mesh.first:
        info = {
            "d_model": d_model,
            "subtract_b_dec": True,  # x - b_dec goes into the encoder
            "hook": hook,
            "tokens_trained": n_steps * config.batch,
            "order_hash": order_hash,
            "order_seed": seed,
            "torch": torch.__version__,
            "store_digest": store.meta.digest,
            **provenance,
        }
        for learner in state.learners:
            write_dictionary(checkpoints, out, learner, step=n_steps, info=info)
        consumer.sign_off()
    return Trained(n_steps, n_steps * config.batch, order_hash, state.seconds)


def _sample(feed: Feed, n_rows: int) -> Float[Tensor, "rows d_model"]:
    """The first rows of the order itself: shuffled, and there as soon as training can begin."""
    parts: list[Tensor] = []
    with feed:
        while sum(map(len, parts)) < n_rows:
            if (batch := feed.next()) is None:
                raise Stopped("nothing was trained yet")  # it ends early only when it is asked to
            parts.append(batch.x.float().clone())
    return torch.cat(parts)[:n_rows]
