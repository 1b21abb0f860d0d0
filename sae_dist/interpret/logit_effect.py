"""The direct effect of a latent on the logits of the next token."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LogitEffects(NamedTuple):
    """The output tokens that a latent raises and lowers most, strongest first."""

    promoted: Int[Tensor, "n_latents n_tokens"]
    promoted_by: Float[Tensor, "n_latents n_tokens"]
    suppressed: Int[Tensor, "n_latents n_tokens"]
    suppressed_by: Float[Tensor, "n_latents n_tokens"]


class Unembedding(NamedTuple):
    """The unembedding, restricted to ids that the tokenizer has."""

    W_U: Float[Tensor, "d_model n_output"]
    tokens: Int[Tensor, " n_output"]  # the id of each column


@torch.no_grad()
def logit_effects(
    W_dec: Float[Tensor, "n_latents d_model"], outputs: Unembedding | str, *, n_tokens: int = 10, chunk: int = 256
) -> LogitEffects:
    """W_dec (W_U - mean over the vocabulary): the logits that one unit of activation adds through the direct path.

    A shift of all logits changes no probability, hence the mean (Bricken et al. 2023, "logit weights"). Instead of the
    unembedding, a reason why a hook point has no direct path to the logits gives empty effects.
    """
    if isinstance(outputs, str):
        ids, values = torch.zeros(len(W_dec), 0, dtype=torch.int64), torch.zeros(len(W_dec), 0)
        return LogitEffects(ids, values, ids, values)
    W_U = outputs.W_U.float()
    W_U = W_U - W_U.mean(dim=1, keepdim=True)
    n_tokens = min(n_tokens, W_U.shape[1])
    parts = []
    for rows in W_dec.split(chunk):
        logits = rows.to(W_U) @ W_U
        up, down = logits.topk(n_tokens, dim=1), logits.topk(n_tokens, dim=1, largest=False)
        parts.append((up.indices.cpu(), up.values.cpu(), down.indices.cpu(), down.values.cpu()))
    raised, raised_by, lowered, lowered_by = (torch.cat(column) for column in zip(*parts, strict=True))
    return LogitEffects(outputs.tokens[raised], raised_by, outputs.tokens[lowered], lowered_by)
