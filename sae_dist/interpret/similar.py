"""The latents with the most similar decoder directions."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Similar(NamedTuple):
    """The nearest other latents, nearest first."""

    latents: Int[Tensor, "n_latents n_nearest"]
    cosine: Float[Tensor, "n_latents n_nearest"]


@torch.no_grad()
def similar_latents(W_dec: Float[Tensor, "n_latents d_model"], *, n_nearest: int = 8, chunk: int = 1024) -> Similar:
    """The largest cosines between rows of the decoder, in chunks of rows."""
    n_latents = len(W_dec)
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    parts = []
    for start in range(0, n_latents, chunk):
        cosine = unit[start : start + chunk] @ unit.T
        cosine.diagonal(offset=start).fill_(-2)  # below every cosine: a latent is not its own neighbour
        nearest = cosine.topk(min(n_nearest, n_latents - 1), dim=1)
        parts.append((nearest.indices.cpu(), nearest.values.cpu()))
    return Similar(*(torch.cat(column) for column in zip(*parts, strict=True)))
