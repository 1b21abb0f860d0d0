"""From the residual stream to the vocabulary: the unembedding as a matrix, and the next-token loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sae_dist.config import UserError
from sae_dist.model.families import around_layers, decoder, layer_paths
from sae_dist.model.hooks import available, resolve

_FINAL_NORMS = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "embedding_norm", "layer_norm", "layernorm",
)  # fmt: skip
_CHUNK_ROWS = 256  # rows of fp32 logits alive at once: 50 MB at a vocabulary of 49,152


@torch.no_grad()
def unembedding(model: PreTrainedModel) -> Float[Tensor, "d_model vocab"]:
    """W_U in fp32 with the final norm folded in: `direction @ W_U` is the direction's effect on the logits.

    The norm is `gain * (x - mean(x)) / scale(x) + bias` (without the mean for RMSNorm). Its gain multiplies the rows of
    the unembedding; its centring, if any, subtracts the mean over d_model from every column, so that a direction along
    (1, ..., 1), which LayerNorm removes, has no effect. Left out: the scale, which depends on the token, and biases,
    which do not depend on the direction.
    """
    head = _head(model)
    W_U = head.weight.float().T * _scale(model)
    project_out = getattr(decoder(model), "project_out", None)
    if isinstance(project_out, nn.Linear):  # OPT-350m: its embeddings are narrower than d_model
        W_U = project_out.weight.float().T @ W_U
    norm = _final_norm(model)
    if norm is None:
        return W_U.clone()

    # Families store their gain differently (Gemma's is 1 + weight, OLMo has none), so it is read off the norm's output:
    # `signs` has mean 0 and rms 1, so any norm returns gain * signs + bias.
    ones = torch.ones(W_U.shape[0], device=W_U.device, dtype=head.weight.dtype)
    if ones.numel() % 2:
        raise UserError(f"the gain of the final norm cannot be read at an odd d_model={ones.numel()}")
    signs = ones.clone()
    signs[1::2] = -1
    gain = (norm(signs) - norm(-signs)).float() / 2 * signs
    constant = (norm(ones) - norm(-ones)).float() / 2  # zero when the norm subtracts the mean
    folded = gain[:, None] * W_U
    return folded - folded.mean(0) if bool((constant == 0).all()) else folded


@torch.no_grad()
def next_token_loss(
    model: PreTrainedModel, tokens: Int[Tensor, "batch context"]
) -> Float[Tensor, "batch next_position"]:
    """Cross-entropy in nats of each token given those before it, in fp32; `next_position` is context - 1.

    Logits are computed for a few positions at a time: [batch, context, vocab] never exists in fp32.
    """
    if layer_paths(model) is None:  # an unknown family may transform its logits: take all of them from the model
        states, unembed, cap, scale = model(input_ids=tokens, use_cache=False).logits, nn.Identity(), None, 1.0
    else:
        states, unembed = decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state, _head(model)
        cap, scale = getattr(decoder(model).config, "final_logit_softcapping", None), _scale(model)
    targets = tokens[:, 1:].flatten()
    rows = states[:, :-1].flatten(0, 1)  # a matrix: for three dims torch would copy W_U for every sequence
    losses = []
    for part, target in zip(rows.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True):
        logits = unembed(part) * scale
        if cap is not None:  # Gemma 2 squashes its logits
            logits = torch.tanh(logits / cap) * cap
        losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
    return torch.cat(losses).view(tokens.shape[0], -1)


def check_direct_path(model: PreTrainedModel, hook: str) -> None:
    """UserError, saying why, where a direction at `hook` has no known direct effect on the logits."""
    point = resolve(model, hook)
    stream = [resolve(model, name) for name in available(model) if not name.startswith("mlp_act")]
    if not any(point.module is own.module and point.side == own.side for own in stream):
        raise UserError(f"hook={hook} is not in the residual stream")
    _head(model)
    _final_norm(model)


def _scale(model: PreTrainedModel) -> float:
    """By which Cohere's models multiply their logits."""
    return getattr(decoder(model).config, "logit_scale", None) or 1.0


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no unembedding matrix")
    return head


def _final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm between the last layer and the unembedding; None in OPT-350m, which has none there."""
    body = around_layers(model)
    for name in _FINAL_NORMS:
        if hasattr(body, name):
            return getattr(body, name)
    raise UserError(f"{type(model).__name__} has no final norm by a known name")
