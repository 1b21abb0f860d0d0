"""Histograms of activations whose range is found while they stream, exactly.

Each latent has N_BINS equal bins on [0, 2^e) with 2^(e-1) <= its maximum < 2^e. When a larger value comes, e grows and
2^s neighbouring bins become one; floor(floor(a) / 2^s) = floor(a / 2^s), so the counts are those of one pass with the
final range, whatever the order.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_BINS = 64
UNSEEN = -(1 << 20)  # exponent of a latent that has not fired: below that of every float


def exponents(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The smallest e with value < 2^e; UNSEEN for values that are not positive."""
    return values.frexp().exponent.long().masked_fill(values <= 0, UNSEEN)


def bins(values: Float[Tensor, " n"], exponent: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """floor(N_BINS value / 2^exponent) for 0 < value < 2^exponent, in integers, so without rounding."""
    mantissa, own = values.frexp()
    return (mantissa * N_BINS).long() >> (exponent - own).clamp(max=62)


def merged(groups: int, shift: int) -> Int[Tensor, "groups members"]:
    """Which old bins each of `groups` bins takes when the range grows by 2^shift; -1 where there is none."""
    members = 1 << min(shift, groups.bit_length())  # beyond this every old bin is in the first new one
    old = torch.arange(groups * members).view(groups, members)
    return old.where(old < groups, -1)


def widen_(counts: Int[Tensor, "n_latents n_bins"], latents: Int[Tensor, " m"], *, shift: int) -> None:
    """Let the range of `latents` grow by 2^shift."""
    old = merged(counts.shape[1], shift)
    counts[latents] = (counts[latents][:, old] * (old >= 0)).sum(-1)
