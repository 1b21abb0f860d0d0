"""How large a dictionary's gradient and weights are, measured now and then without touching what they are of.

Of the two matrices a sample of latents stands for the others, so that it costs nothing beside a step however many there
are. The gradient is read off Adam's first moment before and after the update: first' = first + (1 - beta1)(g - first).
So g is the gradient as Adam had it: without the part along a unit row, and clipped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_dist.train.parallel.collectives import ordered_sum
from sae_dist.train.parallel.step import MeshStep

SAMPLE = 1_024  # latents of a rank
FIRST = "first."  # before the names of Adam's first moments in a state


class Sampled(NamedTuple):
    """Rows of a tensor of latents, evenly spread, or all of a vector; `of` are as many as they stand for."""

    rows: Tensor
    of: int

    @property
    def square(self) -> Tensor:
        """The sum of all squares of the tensor, by its sample."""
        return self.rows.double().square().sum() * (self.of / max(len(self.rows), 1))


def moments(sae: MeshStep) -> dict[str, Sampled] | None:
    """Adam's first moments before an update; None where they are stored in codes."""
    found = {name: tensor for name, tensor in sae.state_dict().items() if name.startswith(FIRST)}
    if any(tensor.dtype != torch.float32 for tensor in found.values()):
        return None
    return {name: _sampled(name, tensor) for name, tensor in found.items()}


def gradient_norm(sae: MeshStep, before: dict[str, Sampled]) -> float:
    """The norm of the gradient that the update since `moments` took; all ranks must ask, or none."""
    if sae.gradient_norm is not None:
        return sae.gradient_norm
    after, beta = moments(sae), sae.shard.betas[0]
    assert after is not None, "moments are stored as they were"
    squares = {
        name: Sampled((now.rows - beta * before[name].rows) / (1 - beta), now.of).square for name, now in after.items()
    }
    whole = [squares.pop(name) for name in (f"{FIRST}b_dec", f"{FIRST}W_skip") if name in squares]  # on every rank
    here = torch.stack(list(squares.values())).sum()
    return float(ordered_sum(sae.mesh, sae.mesh.feature, here, name="norm") + sum(whole)) ** 0.5


def weight_norms(sae: MeshStep) -> dict[str, float]:
    """Mean norms of the latents' encoder and decoder vectors, and norms of the biases, in the units of training."""
    state = sae.state_dict()
    rows = {name: _sampled(name, state[name]).rows.float().norm(dim=1).mean().double() for name in ("W_enc", "W_dec")}
    share = len(sae.latents) / sae.n_latents
    here = torch.stack([rows["W_enc"] * share, rows["W_dec"] * share, state["b_enc"].double().square().sum()])
    encoder, decoder, b_enc = ordered_sum(sae.mesh, sae.mesh.feature, here, name="norms").tolist()
    b_dec = float(state["b_dec"].double().norm())
    return {"encoder_norm": encoder, "decoder_norm": decoder, "b_enc_norm": b_enc**0.5, "b_dec_norm": b_dec}


def _sampled(name: str, tensor: Tensor) -> Sampled:
    """A copy; rows are latents, whichever way the tensor lies."""
    rows = tensor.t() if name.endswith("W_enc") else tensor
    if rows.ndim < 2 or len(rows) <= SAMPLE:
        return Sampled(rows.clone(), len(rows))
    places = torch.arange(SAMPLE, device=rows.device) * len(rows) // SAMPLE
    return Sampled(rows[places], len(rows))
