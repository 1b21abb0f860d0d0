"""The run on one page: rows in their order, a step a batch, a checkpoint now and then, a dictionary at the end.

Every rank of a mesh runs this page, and they do the same at the same time. What there is one of, the first rank does.
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist import faults, storage
from sae_dist.config import Stopped, UserError
from sae_dist.monitor import Log
from sae_dist.sae.config import SAEConfig, check_width
from sae_dist.shards import shuffle
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.reader import Store
from sae_dist.train.checkpoint import Manifest
from sae_dist.train.config import TrainConfig
from sae_dist.train.consumer import Consumer, consumer_name
from sae_dist.train.figures import Window, figures, rates
from sae_dist.train.finish import write_dictionary
from sae_dist.train.guard import Verdict, judge
from sae_dist.train.parallel import checkpoint
from sae_dist.train.parallel.exchange import of_first
from sae_dist.train.parallel.feed import Feed
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.saver import Retention, Saver
from sae_dist.train.schedule import base_lr, lr_factor
from sae_dist.train.state import Source, TrainState, begin, from_checkpoint, local, mine, to_checkpoint

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What a finished training says besides the dictionary's folder."""

    steps: int
    tokens: int
    order_hash: str
    seconds: float  # of training, over all attempts


def train(
    store: Store,
    *,
    hook: str,
    sae: SAEConfig,
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
    """Trains one dictionary on the store's rows and writes `out`/dictionary; goes on from the newest checkpoint.

    The result is a function of the store, the configs, the seed and the kernels: a run that was stopped, or killed, and
    repeated on the same machine and mesh ends in the same dictionary. A `live` store may still be growing; otherwise
    its manifest is pinned. Raises `Stopped`, after a checkpoint, once `stop()` is true on any rank, and `UserError`
    when the guard gives up. `at` is told where this rank is; `log` is called on the first rank alone.
    """
    mesh = mesh or Mesh.single()
    d_model = store.meta.hooks[hook]
    check_width(sae, d_model)
    n_steps, lr = config.n_steps, config.lr or base_lr(sae.n_latents)
    group = checkpoint.group_of(mesh, checkpoint_timeout_s)

    def feed(step: int, order_hash: int, manifest: int | None, until: int) -> Feed:
        return Feed(
            mesh, store, hook, batch=config.batch, seed=seed, order=order, start_step=step, order_hash=order_hash,
            live=live, manifest=None if manifest is None else store.pinned(manifest), stop=stop,
            stop_step=until,
        )  # fmt: skip

    def fresh(source: Source) -> TrainState:
        x = _sample(feed(0, 0, source.manifest, -(-config.init_rows // config.batch)), config.init_rows)
        return begin(x, sae, config, mesh, seed=seed, source=source)

    def tell(kept: list[Manifest]) -> None:
        if len(kept) == config.keep_checkpoints:  # else a damaged one would lead back to the start
            consumer.save(kept[0].facts["units_done"])

    checkpoints = storage.open(config.checkpoints or out / "checkpoints")
    at(0, "reading")
    saved = checkpoint.latest(group, checkpoints, mine(mesh, sae.n_latents))
    if saved is None:
        version = None if live else of_first(mesh, store.snapshot().version if mesh.first else 0, name="manifest")
        state = fresh(Source(store.meta.digest, hook, version))
    else:
        state = from_checkpoint(saved, sae, config, mesh)
        if state.source[:2] != (store.meta.digest, hook):
            raise UserError(
                f"out={out} was trained on {state.source.hook} of store {state.source.store}, not on {hook} of "
                f"{store.meta.digest} ({store.storage.uri}); choose another out="
            )
        if mesh.first:
            logger.info("going on from step %d of %d", state.step, n_steps)
    del saved

    def back(verdict: Verdict) -> TrainState:
        """The weights of the last checkpoint that learned something; the rows since then are not trained on again."""
        earlier = checkpoint.latest(
            group, checkpoints, mine(mesh, sae.n_latents), among=lambda m: not m.facts["guard"]["in_a_row"]
        )
        if earlier is None:
            return state._replace(sae=fresh(state.source).sae, guard=verdict.guard)
        state.sae.load_state_dict_(local(earlier))
        return state._replace(guard=verdict.guard)

    consumer = Consumer(
        store.storage if live and mesh.first else None, consumer_name(out), taken=state.units_done, saved=0
    )
    if state.step < n_steps:
        begun, started, window = state, time.monotonic(), Window()
        retention = Retention(config.keep_checkpoints, config.keep_every)
        write, stopping = functools.partial(checkpoint.save, group), False
        with (
            closing(Saver(checkpoints, retention, write=write, leads=mesh.first)) as saver,
            feed(state.step, state.order_hash, state.source.manifest, n_steps) as batches,
        ):
            at(state.step, "training")
            while (batch := batches.next(stop=stopping)) is not None:
                factor = lr_factor(
                    state.step, n_steps=n_steps, warmup_fraction=config.warmup_fraction,
                    decay_fraction=config.decay_fraction,
                )  # fmt: skip
                x = batch.x.float() * state.scale
                verdict, squared_error, active = _step(state, config, x, lr=lr * factor)
                state = state._replace(
                    step=state.step + 1, order_hash=batch.order_hash, units_done=batch.units_done,
                    guard=verdict.guard, seconds=begun.seconds + time.monotonic() - started,
                )  # fmt: skip
                at(state.step, "training")
                match verdict.decision:
                    case "step":
                        window = window.add(squared_error, active, len(x))
                    case "stop":
                        raise UserError(
                            f"{verdict.alert}, up to step {state.step}; lower train.lr={lr:g}, in another out="
                        )
                    case "roll_back":
                        tell(saver.wait())
                        state = back(verdict)
                        tell(saver.save(to_checkpoint(state)))  # so that a repeated run goes back to the same
                consumer.take(state.units_done, starved_s=batches.starved_s())
                done = state.step == n_steps
                alert = {} if verdict.alert is None else {"alert": f"step {state.step}: {verdict.alert}"}
                if done or alert or state.step % config.log_every == 0:
                    rest = rates(state, begun, config.batch, batches.starved_s()) | saver.figures() | alert
                    rest |= {"shuffle_inflation": shuffle.inflation(batch.docs().numpy())}  # at best 1 + batch m / rows
                    line = {"epoch": batch.epoch, "lr": lr * factor} | figures(window, state) | rest
                    window = Window()
                    if mesh.first:
                        log(state.step, line)
                if alert and mesh.first:
                    logger.error("ALERT: %s", alert["alert"])
                if done:
                    break
                faults.point("train.step", step=state.step, rank=mesh.world.rank)
                tell(saver.save(to_checkpoint(state)) if state.step % config.checkpoint_every == 0 else saver.poll())
                stopping = stop()
            at(state.step, "saving")
            tell(saver.finish(to_checkpoint(state)))  # done, or asked to stop, perhaps while no rows came
        if state.step < n_steps:
            raise Stopped(f"step {state.step} of {n_steps} is saved")

    order_hash = f"{state.order_hash:016x}"
    if mesh.first:
        info = {
            "variant": sae.kind,
            "n_latents": sae.n_latents,
            "d_model": d_model,
            "subtract_b_dec": True,  # x - b_dec goes into the encoder
            "hook": hook,
            "tokens_trained": n_steps * config.batch,
            "skipped_steps": state.guard.skipped,
            "order_hash": order_hash,
            "seed": seed,
            "kernels": state.sae.shard.backend_used,
            "torch": torch.__version__,
            "store_digest": store.meta.digest,
            **provenance,
        }
        write_dictionary(checkpoints, out, step=n_steps, k=sae.k, info=info)
        consumer.sign_off()
    return Trained(n_steps, n_steps * config.batch, order_hash, state.seconds)


def _step(state: TrainState, config: TrainConfig, x: Tensor, *, lr: float) -> tuple[Verdict, float, float]:
    """One step, or none, as the guard says; the verdict, the squared error and the number of active values."""
    sae = state.sae
    said = sae.forward(x, variance=state.variance)
    squared_error = float(said.squared_error)
    loss = squared_error / (len(x) * state.variance)
    verdict = judge(state.guard, config.guard, loss=loss, finite=sae.is_sound(said))
    if verdict.decision == "step":
        sae.update_(lr=lr)
        sae.count_(said.fired, tokens=len(x))
    else:
        sae.skip_()
    return verdict, squared_error, float(said.active)


def _sample(feed: Feed, n_rows: int) -> Float[Tensor, "rows d_model"]:
    """The first rows of the order itself: shuffled, and there as soon as training can begin."""
    parts: list[Tensor] = []
    with feed:
        while sum(map(len, parts)) < n_rows:
            if (batch := feed.next()) is None:
                raise Stopped("nothing was trained yet")  # it ends early only when it is asked to
            parts.append(batch.x.float().clone())
    return torch.cat(parts)[:n_rows]
