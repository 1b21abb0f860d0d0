"""What a training is made of between two steps: all of it is in a checkpoint, nothing else is anywhere."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from sae_kernels.topk_step import TopKStep
from torch import Tensor

from sae_dist.sae.config import SAEConfig, resolved_k_aux
from sae_dist.sae.initialize import Parameters, initialize
from sae_dist.sae.scale import input_scale
from sae_dist.train.checkpoint import Checkpoint


class Source(NamedTuple):
    """Where the rows come from; a checkpoint goes on with these rows only."""

    store: str  # digest of store.json
    hook: str
    manifest: int | None  # version that the order is pinned to; None while the store grows


class TrainState(NamedTuple):
    """The state after `step` steps."""

    step: int
    sae: TopKStep
    scale: float  # x is multiplied by it before anything else
    variance: float  # mean over rows of ||x - mean||^2, scaled: the loss's constant denominator
    order_hash: int  # of the rows seen
    units_done: int  # of the first pass: what no later step reads in it
    source: Source
    skipped: int  # steps whose loss was not finite, in which nothing was learned
    seconds: float  # of training so far, over all attempts


def begin(x: Float[Tensor, "rows d_model"], sae: SAEConfig, *, seed: int, source: Source) -> TrainState:
    """The state before step 0, from a sample of raw rows: input scale, variance, initial parameters."""
    scale = input_scale(float(x.double().square().sum(-1).mean()), x.shape[1])
    x = x * scale
    variance = float((x - x.mean(0)).double().square().sum(-1).mean())
    parameters = initialize(x, n_latents=sae.n_latents, k=sae.k, seed=seed)
    return TrainState(0, _step(parameters, sae), scale, variance, 0, 0, source, 0, 0.0)


def to_checkpoint(state: TrainState) -> Checkpoint:
    """The state as it is; the tensors share memory with it. Rows are latents, in W_enc too."""
    facts = {name: value for name, value in state._asdict().items() if name not in ("step", "sae")}
    return Checkpoint(state.step, _transposed(state.sae.state_dict()), facts)


def from_checkpoint(saved: Checkpoint, sae: SAEConfig) -> TrainState:
    """The state as it was saved, bit for bit."""
    tensors = _transposed({name: part for name, part in saved.tensors.items() if isinstance(part, Tensor)})
    parameters = Parameters(*(tensors[name] for name in Parameters._fields))
    step = _step(parameters, sae)
    step.load_state_dict_(tensors)
    facts = dict(saved.facts)
    return TrainState(saved.step, step, source=Source(*facts.pop("source")), **facts)


def _transposed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W_enc and its moments lie in memory as [n_latents, d_model], and so they do in a checkpoint."""
    return {name: tensor.t() if name.endswith("W_enc") else tensor for name, tensor in tensors.items()}


def parameters(state: TrainState) -> Parameters:
    """The weights, on scaled input; they change with the next step."""
    return Parameters(state.sae.W_enc, state.sae.W_dec, state.sae.b_enc, state.sae.b_dec)


def _step(parameters: Parameters, sae: SAEConfig) -> TopKStep:
    W_enc, W_dec, b_enc, b_dec = parameters
    return TopKStep(
        W_enc, W_dec, b_enc=b_enc, b_dec=b_dec, k=sae.k, k_aux=resolved_k_aux(sae, W_dec.shape[1]),
        aux_coefficient=sae.aux_coefficient, dead_after_tokens=sae.dead_after_tokens,
    )  # fmt: skip
