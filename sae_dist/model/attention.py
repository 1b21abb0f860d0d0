"""What the attention of one layer moves from token to token, head by head, along a direction of the residual stream.

With the pattern as it is, attention is linear: a head writes into a position the sum over earlier tokens of its weight
times the token's value, projected (Elhage et al. 2021, the OV circuit).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from sae_dist.config import UserError
from sae_dist.model.families import layer_paths, layers
from sae_dist.model.hooks import PreTrainedModel, capture, resolve

_ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a sum over all tokens


@torch.no_grad()
def moved_along(
    model: PreTrainedModel,
    tokens: Int[Tensor, " context"],
    layer: int,
    position: int,
    direction: Float[Tensor, " width"],
) -> Float[Tensor, "heads context"]:
    """What each head of `layer` writes into `position` from each token, along `direction`; 0 of later tokens.

    All of it together is `direction` . attn_out at `position`, less what attention writes where all values are 0. Where
    a norm follows attention, it is taken as the factor that it is there. UserError where `model` names no attn_out, or
    does more than this in its attention.
    """
    hook = f"attn_out.{layer}"
    resolve(model, hook)  # UserError where there is none
    inside, stack = layer_paths(model), layers(model)[layer]
    assert inside is not None
    projection, attention = (stack.get_submodule(own) for own in (inside.heads, inside.heads.rpartition(".")[0]))
    path = next(name for name, module in model.named_modules() if module is projection)
    cache = DynamicCache()  # without the model's configuration it keeps all tokens, also of a sliding window
    with _eager(model), _pattern(attention) as patterns:  # not output_attentions, which keeps those of all layers
        model(input_ids=tokens[None], use_cache=True, past_key_values=cache)
        written = {name: x[0, position].float() for name, x in capture(model, tokens[None], [hook, path]).items()}
    weights = patterns[0][0, :, position].float()
    values = _values(cache, attention, layer).float()
    values = values.repeat_interleave(len(weights) // len(values), 0)
    out, projected = written[hook], written[path]
    follows = not inside.heads.startswith(f"{inside.attn_out}.")  # a norm follows the projection
    factor = torch.where(projected == 0, 0, out / projected) if follows else torch.ones_like(out)
    usual, gradient = _linear(projection, direction * factor, weights.shape[0] * values.shape[2])
    moved = weights * (values @ gradient.view(len(weights), -1, 1)).squeeze(2)
    off, size = float(moved.sum() + usual - direction @ out), float(moved.abs().sum() + abs(usual))
    if abs(off) > _ROUNDING.get(model.dtype, 1e-3) * size:
        raise UserError(
            f"hook={hook} of {model.config.name_or_path or type(model).__name__} is not a sum of its tokens' values "
            f"(it is off by {off / size:.1%}), so that what each token brings is not known; leave out sources="
        )
    return moved


def _values(cache: DynamicCache, attention: nn.Module, layer: int) -> Float[Tensor, "some_heads context head_width"]:
    """Those of the one sequence. Multi-head latent attention keeps what they are made of."""
    kept: Any = cache.layers[layer]  # transformers types caches too loosely
    expand = getattr(attention, "expand_kv", None)
    return kept.values[0] if expand is None else expand(kept.keys, kept.values)[1][0]


def _linear(projection: nn.Module, direction: Tensor, width: int) -> tuple[float, Float[Tensor, " width"]]:
    """Along `direction`, what the projection gives of zeros, and its gradient."""
    kind = next(projection.parameters())
    with torch.enable_grad():
        zeros = torch.zeros(1, 1, width, dtype=kind.dtype, device=kind.device, requires_grad=True)
        along = projection(zeros)[0, 0].float() @ direction
        return float(along.detach()), torch.autograd.grad(along, zeros)[0][0, 0].float()


@contextmanager
def _pattern(attention: nn.Module) -> Iterator[list[Float[Tensor, "batch heads context context"]]]:
    """The weights of a module of attention, a pass each, until the context ends."""
    found: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _, __, output: found.append(output[1]))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention in plain torch, which gives its weights, until the context ends."""
    before = str(model.config._attn_implementation)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
