"""The run on one page: rows in their order, a step a batch, a checkpoint now and then, a dictionary at the end."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_kernels.topk_step import TopKStep
from torch import Tensor

from sae_dist.config import Stopped
from sae_dist.monitor import Log
from sae_dist.sae import dictionary as dictionary_file
from sae_dist.sae.config import SAEConfig, check_width, resolved_k_aux
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters, initialize
from sae_dist.sae.scale import fold_scale, input_scale
from sae_dist.shards.loader import Loader
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.reader import Store
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import Checkpoint
from sae_dist.train.config import TrainConfig
from sae_dist.train.schedule import base_lr, lr_factor

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What a finished training leaves besides the dictionary's folder."""

    dictionary: Dictionary
    steps: int
    tokens: int
    order_hash: str
    seconds: float  # of training, over all attempts


class TrainState(NamedTuple):
    """All that a checkpoint holds."""

    step: int  # steps done
    sae: TopKStep
    scale: float  # x is multiplied by it before anything else
    variance: float  # mean over rows of ||x - mean||^2, scaled: the loss's constant denominator
    order_hash: int
    seconds: float


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

    The result is a function of the store, the configs and the seed: a run that was stopped, or killed, and repeated
    ends in the same dictionary. Raises `Stopped`, after a checkpoint, once `stop()` is true.
    """
    d_model = store.meta.hooks[hook]
    check_width(sae, d_model)
    if config.threads:
        torch.set_num_threads(config.threads)
    n_steps, checkpoints = config.n_steps, out / "checkpoints"
    lr = config.lr or base_lr(sae.n_latents)
    open_loader = _loaders(store, hook, config=config, order=order, seed=seed, live=live)

    saved = checkpoint.latest(checkpoints)
    if saved is None:
        state = _begin(_sample(open_loader(0, 0), config.init_rows), sae, seed)
    else:
        state = _restore(saved, sae, d_model)
        logger.info("going on from step %d of %d", state.step, n_steps)

    def save(state: TrainState) -> None:
        checkpoint.save(checkpoints, _checkpoint(state))
        checkpoint.prune(checkpoints, config.keep_checkpoints)

    started, before, rows_before = time.monotonic(), state.seconds, state.step * config.batch
    squared_error, active, rows = 0.0, 0.0, 0
    if state.step < n_steps:
        with open_loader(state.step, state.order_hash) as loader:
            for batch in loader:
                x = batch.x.float() * state.scale
                factor = lr_factor(
                    state.step,
                    n_steps=n_steps,
                    warmup_fraction=config.warmup_fraction,
                    decay_fraction=config.decay_fraction,
                )
                figures = state.sae.step(x, lr=lr * factor, variance=state.variance)
                seconds = before + time.monotonic() - started
                state = state._replace(step=state.step + 1, order_hash=batch.order_hash, seconds=seconds)
                squared_error += float(figures.squared_error)
                active += float(figures.active)
                rows += x.shape[0]
                done = state.step == n_steps
                if done or state.step % config.log_every == 0:
                    tokens = state.step * config.batch
                    log(
                        state.step,
                        {
                            "tokens": tokens,
                            "epoch": batch.epoch,
                            "fvu": squared_error / (rows * state.variance),
                            "l0": active / rows,
                            "dead_fraction": float(state.sae.dead.float().mean()),
                            "lr": lr * factor,
                            "tokens_per_second": (tokens - rows_before) / max(seconds - before, 1e-9),
                            "starved_fraction": loader.waits().starved_s / max(seconds - before, 1e-9),
                            "order_hash": f"{state.order_hash:016x}",  # type: ignore[dict-item]
                        },
                    )
                    squared_error, active, rows = 0.0, 0.0, 0
                if done or state.step % config.checkpoint_every == 0:
                    save(state)
                if done:
                    break
                if stop():
                    save(state)
                    raise Stopped(f"step {state.step} of {n_steps} is saved")

    order_hash = f"{state.order_hash:016x}"
    finished = Dictionary(
        parameters=fold_scale(_parameters(state.sae), state.scale),
        k=sae.k,
        info={
            "variant": sae.kind,
            "n_latents": sae.n_latents,
            "d_model": d_model,
            "subtract_b_dec": True,  # x - b_dec goes into the encoder
            "hook": hook,
            "tokens_trained": n_steps * config.batch,
            "order_hash": order_hash,
            "seed": seed,
            **provenance,
        },
    )
    dictionary_file.save(finished, out / "dictionary")
    return Trained(finished, n_steps, n_steps * config.batch, order_hash, state.seconds)


def _loaders(
    store: Store, hook: str, *, config: TrainConfig, order: OrderConfig, seed: int, live: bool
) -> Callable[[int, int], Loader]:
    def open_at(step: int, order_hash: int) -> Loader:
        return Loader(
            store,
            hook=hook,
            batch=config.batch,
            seed=seed,
            order=order,
            start_step=step,
            order_hash=order_hash,
            live=live,
        )

    return open_at


def _sample(loader: Loader, n_rows: int) -> Float[Tensor, "rows d_model"]:
    """The first rows of the order itself: shuffled, and there as soon as training can begin."""
    parts, rows = [], 0
    with loader:
        for batch in loader:
            parts.append(batch.x.float().clone())
            rows += batch.x.shape[0]
            if rows >= n_rows:
                break
    return torch.cat(parts)[:n_rows]


def _begin(x: Float[Tensor, "rows d_model"], sae: SAEConfig, seed: int) -> TrainState:
    scale = input_scale(float(x.double().square().sum(-1).mean()), x.shape[1])
    x = x * scale
    variance = float((x - x.mean(0)).double().square().sum(-1).mean())
    parameters = initialize(x, n_latents=sae.n_latents, k=sae.k, seed=seed)
    return TrainState(0, _sae(parameters, sae), scale, variance, 0, 0.0)


def _sae(parameters: Parameters, sae: SAEConfig) -> TopKStep:
    W_enc, W_dec, b_enc, b_dec = parameters
    return TopKStep(
        W_enc, W_dec, b_enc=b_enc, b_dec=b_dec, k=sae.k, k_aux=resolved_k_aux(sae, W_dec.shape[1]),
        aux_coefficient=sae.aux_coefficient, dead_after_tokens=sae.dead_after_tokens,
    )  # fmt: skip


def _parameters(sae: TopKStep) -> Parameters:
    return Parameters(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)


def _checkpoint(state: TrainState) -> Checkpoint:
    facts = {name: value for name, value in state._asdict().items() if name not in ("step", "sae")}
    return Checkpoint(state.step, state.sae.state_dict(), facts)


def _restore(saved: Checkpoint, sae: SAEConfig, d_model: int) -> TrainState:
    zeros = Parameters(
        torch.zeros(d_model, sae.n_latents),
        torch.zeros(sae.n_latents, d_model),
        torch.zeros(sae.n_latents),
        torch.zeros(d_model),
    )
    empty = _sae(zeros, sae)
    empty.load_state_dict_(saved.tensors)
    return TrainState(saved.step, empty, **saved.facts)
