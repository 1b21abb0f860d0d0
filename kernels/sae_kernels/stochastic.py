"""Stochastic rounding whose random bits are a function of what is rounded: of (seed, step, stream, latent, dimension).

Nothing is drawn from a generator, so a repeated step rounds the same way, and so does a latent on whichever rank it is.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = (1 << 64) - 1
_LOW_16, _LOW_17 = (1 << 16) - 1, (1 << 17) - 1  # what is left of an int32 after a logical shift by 16 and 15
_GOLDEN = 0x9E3779B9 - (1 << 32)  # as int32: neighbouring dimensions differ in half of their bits
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


def random_bits(
    latents: Int[Tensor, " rows"], d_model: int, *, seed: int, step: int, stream: int
) -> Int[Tensor, "rows d_model"]:
    """32 uniform bits an element, as int32: a hash of the row's key and the dimension (lowbias32; C. Wellons, 2018).

    `latents` are numbers in the whole dictionary, not in a shard; `stream` keeps several uses of one step apart.
    """
    base = key_of(seed=seed, step=step, stream=stream)
    keys = _mix_rows(latents.long() ^ (base if base < 1 << 63 else base - (1 << 64)))
    bits = keys[:, None] ^ (torch.arange(d_model, dtype=torch.int32, device=latents.device) * _GOLDEN)
    bits ^= (bits >> 16).bitwise_and_(_LOW_16)
    bits *= _FIRST
    bits ^= (bits >> 15).bitwise_and_(_LOW_17)
    bits *= _SECOND
    bits ^= (bits >> 16).bitwise_and_(_LOW_16)
    return bits


def key_of(*, seed: int, step: int, stream: int) -> int:
    """What all `random_bits` of one use have in common: 64 bits."""
    return _mix(_mix(_mix(seed) ^ step) ^ stream)


def round_bfloat16(
    x: Float[Tensor, "rows d_model"], bits: Int[Tensor, "rows d_model"]
) -> Float[Tensor, "rows d_model"]:
    """x in bf16, rounded up in magnitude with probability (distance from the lower neighbour) / (gap): unbiased.

    The lower 16 of `bits` are added to the 16 that bf16 lacks and the sum is cut off. Infinity and NaN stay.
    """
    raised = (x.view(torch.int32) + (bits & _LOW_16)).bitwise_and_(~_LOW_16).view(torch.float32)
    return torch.where(torch.isfinite(x), raised, x).bfloat16()


def _mix(x: int) -> int:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of 64 bits without visible order."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _mix_rows(x: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """`_mix` of int64 (which wrap), and of the result the lower half."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return x.to(torch.int32)  # keeps the lower 32 bits
