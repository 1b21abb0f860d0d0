"""The cost of a forward pass, from the architecture alone: FLOP for utilisation, memory for the batch size."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from sae_dist.model.families import decoder, layers
from sae_dist.model.hooks import resolve


def layers_run(model: PreTrainedModel, hooks: Sequence[str]) -> list[nn.Module]:
    """The layers that run, at least in part, until the last of `hooks`; the decoder where layers are not known."""
    stack, last = layers(model), 0
    if not stack:
        return [decoder(model)]
    for hook in hooks:
        point = resolve(model, hook)
        inside = [i for i, layer in enumerate(stack) if any(module is point.module for module in layer.modules())]
        if not inside:  # before the first layer or after the last
            after = point.module not in set(decoder(model).get_input_embeddings().modules())
            last = max(last, len(stack) if after else 0)
        elif point.side == "input" and point.module is stack[inside[0]]:
            last = max(last, inside[0])
        else:
            last = max(last, inside[0] + 1)
    return stack[:last]


def flop_per_token(model: PreTrainedModel, hooks: Sequence[str], context: int) -> float:
    """FLOP a token of a forward pass up to the last of `hooks`: 2 for every weight of a matrix, and attention.

    Causal attention looks at (context + 1) / 2 positions on average, at 4 operations for each of heads x head_dim.
    A layer that runs in part counts whole; all experts of a mixture count.
    """
    run = layers_run(model, hooks)
    weights = sum(_matrix_size(module) for part in run for module in part.modules())
    n_layers = len(run) if layers(model) else getattr(decoder(model).config, "num_hidden_layers", 0)
    return 2.0 * weights + n_layers * 4 * _heads(model) * _head_dim(model) * (context + 1) / 2


def bytes_per_token(model: PreTrainedModel, hooks: Sequence[str], context: int) -> int:
    """Bytes that a token of a batch takes at most, approximately: one layer's intermediate values and the captures.

    At once in memory: the stream, its normalised copy (in fp32) and the MLP's three hidden tensors, or attention's;
    `eager` attention also needs heads x context scores in fp32 and in the model's dtype.
    """
    config, size = decoder(model).config, model.dtype.itemsize
    d_model = config.hidden_size
    layer = (layers(model) or [decoder(model)])[0]
    hidden = max((_outputs(module) for module in layer.modules()), default=d_model)
    inside = size * (3 * d_model + 3 * max(hidden, d_model)) + 4 * 2 * d_model
    if config._attn_implementation == "eager":
        inside += (4 + 2 * size) * _heads(model) * context
    return inside + size * sum(_widest(model, hook) for hook in hooks)


def _heads(model: PreTrainedModel) -> int:
    """Heads of a layer; 0 in a model that has none (Mamba)."""
    return getattr(decoder(model).config, "num_attention_heads", None) or 0


def _head_dim(model: PreTrainedModel) -> int:
    """Width of a head; d_model / heads where layers differ."""
    config = decoder(model).config
    head_dim = config.to_dict().get("head_dim")  # as an attribute it may raise where layers differ
    return head_dim if isinstance(head_dim, int) else config.hidden_size // max(_heads(model), 1)


def _matrix_size(module: nn.Module) -> int:
    """Number of the module's own weights that multiply activations; of a quantised layer by its features."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
    return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2)


def _outputs(module: nn.Module) -> int:
    if hasattr(module, "out_features"):
        return int(module.out_features)  # type: ignore[arg-type]
    return max((p.shape[-1] for p in module.parameters(recurse=False) if p.dim() >= 2), default=0)


def _widest(model: PreTrainedModel, hook: str) -> int:
    """An upper bound of the hook point's width that needs no forward pass."""
    if hook.startswith(("resid", "attn_out", "mlp_out")):
        return decoder(model).config.hidden_size
    point = resolve(model, hook)
    own = (getattr(point.module, "in_features" if point.side == "input" else "out_features", 0), _outputs(point.module))
    return max(*(int(n) for n in own), decoder(model).config.hidden_size)
