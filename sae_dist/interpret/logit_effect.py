"""What a latent says directly about the next token."""

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


@torch.no_grad()
def logit_effects(
    W_dec: Float[Tensor, "n_latents d_model"],
    W_U: Float[Tensor, "d_model vocab"],
    *,
    n_tokens: int = 10,
    chunk: int = 256,
) -> LogitEffects:
    """W_dec (W_U - mean over the vocabulary): the logits that one unit of activation adds through the direct path.

    A shift of all logits changes no probability, hence the mean (Bricken et al. 2023, "logit weights").
    """
    n_tokens = min(n_tokens, W_U.shape[1])
    W_U = W_U.float() - W_U.float().mean(dim=1, keepdim=True)
    parts = []
    for rows in W_dec.split(chunk):
        logits = rows.to(W_U) @ W_U
        up, down = logits.topk(n_tokens, dim=1), logits.topk(n_tokens, dim=1, largest=False)
        parts.append((up.indices.cpu(), up.values.cpu(), down.indices.cpu(), down.values.cpu()))
    return LogitEffects(*(torch.cat(column) for column in zip(*parts, strict=True)))
