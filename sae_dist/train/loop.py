"""The run on one page: rows in their order, a step a batch, a checkpoint now and then, a dictionary at the end."""

import logging
import math
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
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.config import SAEConfig, check_width
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.scale import fold_scale
from sae_dist.shards import shuffle
from sae_dist.shards.loader import Loader
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.reader import Store
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import Manifest
from sae_dist.train.config import TrainConfig
from sae_dist.train.consumer import Consumer, consumer_name
from sae_dist.train.saver import Retention, Saver
from sae_dist.train.schedule import base_lr, lr_factor
from sae_dist.train.state import Source, TrainState, begin, from_checkpoint, parameters, to_checkpoint

logger = logging.getLogger(__name__)

MAX_SKIPPED = 10  # steps in a row without a finite loss: it will not heal by itself


class Trained(NamedTuple):
    """What a finished training leaves besides the dictionary's folder."""

    dictionary: Dictionary
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
    live: bool = False,
    provenance: Mapping[str, Any],
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains one dictionary on the store's rows and writes `out`/dictionary; goes on from the newest checkpoint.

    The result is a function of the store, the configs, the seed and the kernels: a run that was stopped, or killed, and
    repeated on the same machine ends in the same dictionary. A `live` store may still be growing; otherwise its
    manifest is pinned. Raises `Stopped`, after a checkpoint, once `stop()` is true, and `UserError` when the loss stops
    being finite.
    """
    d_model = store.meta.hooks[hook]
    check_width(sae, d_model)
    n_steps, lr = config.n_steps, config.lr or base_lr(sae.n_latents)

    def loader(step: int, order_hash: int, manifest: int | None) -> Loader:
        pinned = None if manifest is None else store.pinned(manifest)
        return Loader(
            store, hook=hook, batch=config.batch, seed=seed, order=order, start_step=step, order_hash=order_hash,
            live=live, manifest=pinned, stop=stop,
        )  # fmt: skip

    def tell(kept: list[Manifest]) -> None:
        if len(kept) == config.keep_checkpoints:  # else a damaged one would lead back to the start
            consumer.save(kept[0].facts["units_done"])

    checkpoints = storage.open(config.checkpoints or out / "checkpoints")
    saved = checkpoint.latest(checkpoints)
    if saved is None:
        manifest = None if live else store.snapshot().version
        source = Source(store.meta.digest, hook, manifest)
        state = begin(_sample(loader(0, 0, manifest), config.init_rows), sae, seed=seed, source=source)
    else:
        state = from_checkpoint(saved, sae)
        if state.source[:2] != (store.meta.digest, hook):
            raise UserError(
                f"out={out} was trained on {state.source.hook} of store {state.source.store}, not on {hook} of "
                f"{store.meta.digest} ({store.storage.uri}); choose another out="
            )
        logger.info("going on from step %d of %d", state.step, n_steps)

    consumer = Consumer(store.storage if live else None, consumer_name(out), taken=state.units_done, saved=0)
    if state.step < n_steps:
        begun, started, skipped = state, time.monotonic(), 0
        window = _Window(0.0, 0.0, 0)
        retention = Retention(config.keep_checkpoints, config.keep_every)
        with (
            closing(Saver(checkpoints, retention)) as saver,
            loader(state.step, state.order_hash, state.source.manifest) as batches,
        ):
            for batch in batches:
                factor = lr_factor(
                    state.step, n_steps=n_steps, warmup_fraction=config.warmup_fraction,
                    decay_fraction=config.decay_fraction,
                )  # fmt: skip
                x = batch.x.float() * state.scale
                figures = state.sae.step(x, lr=lr * factor, variance=state.variance)
                squared_error, finite = float(figures.squared_error), math.isfinite(float(figures.squared_error))
                skipped = 0 if finite else skipped + 1
                if finite:
                    window = window.add(squared_error, float(figures.active), x.shape[0])
                state = state._replace(
                    step=state.step + 1, order_hash=batch.order_hash, units_done=batch.units_done,
                    skipped=state.skipped + (not finite), seconds=begun.seconds + time.monotonic() - started,
                )  # fmt: skip
                if skipped == MAX_SKIPPED:
                    raise UserError(
                        f"the loss was not finite {skipped} steps in a row, up to step {state.step}; lower train.lr="
                        f"{lr:g}, and run again: it goes on from the last checkpoint"
                    )
                consumer.take(state.units_done)
                done = state.step == n_steps
                if done or state.step % config.log_every == 0:
                    rates = _rates(state, begun, config.batch, batches.waits().starved_s)
                    figures = window.figures(state) | rates | saver.figures()
                    mixed = {"shuffle_inflation": shuffle.inflation(batch.doc)}  # at its best 1 + batch m / rows
                    log(state.step, {"epoch": batch.epoch, "lr": lr * factor} | mixed | figures)
                    window = _Window(0.0, 0.0, 0)
                if done or stop():
                    break
                faults.point("train.step", step=state.step)
                tell(saver.save(to_checkpoint(state)) if state.step % config.checkpoint_every == 0 else saver.poll())
            tell(saver.finish(to_checkpoint(state)))  # done, or asked to stop, perhaps while no rows came
        if state.step < n_steps:
            raise Stopped(f"step {state.step} of {n_steps} is saved")

    order_hash = f"{state.order_hash:016x}"
    info = {
        "variant": sae.kind,
        "n_latents": sae.n_latents,
        "d_model": d_model,
        "subtract_b_dec": True,  # x - b_dec goes into the encoder
        "hook": hook,
        "tokens_trained": n_steps * config.batch,
        "skipped_steps": state.skipped,
        "order_hash": order_hash,
        "seed": seed,
        "kernels": state.sae.backend_used,
        "torch": torch.__version__,
        "store_digest": store.meta.digest,
        **provenance,
    }
    finished = Dictionary(parameters=fold_scale(parameters(state), state.scale), k=sae.k, info=info)
    dictionary_file.save(finished, out / "dictionary")
    consumer.sign_off()
    return Trained(finished, n_steps, n_steps * config.batch, order_hash, state.seconds)


class _Window(NamedTuple):
    """Sums since the last line of the log."""

    squared_error: float
    active: float
    rows: int

    def add(self, squared_error: float, active: float, rows: int) -> "_Window":
        return _Window(self.squared_error + squared_error, self.active + active, self.rows + rows)

    def figures(self, state: TrainState) -> dict[str, Any]:
        rows = max(self.rows, 1)
        return {
            "fvu": self.squared_error / (rows * state.variance),
            "l0": self.active / rows,
            "dead_fraction": float(state.sae.dead.float().mean()),
            "skipped_steps": state.skipped,
            "order_hash": f"{state.order_hash:016x}",
        }


def _rates(state: TrainState, begun: TrainState, batch: int, starved_s: float) -> dict[str, Any]:
    """Tokens a second of this attempt, and the share of its time spent waiting for rows."""
    seconds = max(state.seconds - begun.seconds, 1e-9)
    return {
        "tokens": state.step * batch,
        "tokens_per_second": (state.step - begun.step) * batch / seconds,
        "starved_fraction": starved_s / seconds,
    }


def _sample(loader: Loader, n_rows: int) -> Float[Tensor, "rows d_model"]:
    """The first rows of the order itself: shuffled, and there as soon as training can begin."""
    parts, rows = [], 0
    with loader:
        for batch in loader:
            parts.append(batch.x.float().clone())
            rows += batch.x.shape[0]
            if rows >= n_rows:
                return torch.cat(parts)[:n_rows]
    raise Stopped("nothing was trained yet")  # the loader ends early only when it is asked to
