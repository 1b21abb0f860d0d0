"""Adam's moments in one byte: floats of eight bits with a scale for every block of a row.

As in Dettmers et al. (2022, "8-bit Optimizers via Block-wise Quantization") the codes lie denser near zero, since a
moment is divided by a moment: what counts is the relative error. Here they are small floats, three bits of mantissa and
four (first moment, with a sign) or five (second moment) of exponent: a neighbour is at most 1/8 away, over a range of
2^-15 or 2^-31 of the block's largest. Encoding is an addition and a shift of the bits, on any device.

Rounding is stochastic. beta2 = 0.999 moves a second moment by 0.1 % a step, below a code's width: rounded to nearest it
would never decay. Blocks do not cross rows, so that codes do not depend on how latents are spread over ranks.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

_TOP = 1.875  # the largest code's value before scaling: mantissa 1.111, exponent 0
_SHIFT = 20  # bits of an fp32 mantissa beyond the first three
_LOW = (1 << _SHIFT) - 1
_SIGNED = (0x3FF - 127, 127)  # (bits of 1.875 >> 20) - largest code, largest code
_UNSIGNED = (0x3FF - 255, 255)
_LEAST = 2.0**-15 * 1.125  # code 1 of the signed ones
_LEAST_SCALE = 2.0**-126  # of a block of zeros, so that nothing divides by zero


class Coded(NamedTuple):
    """Rows of eight-bit codes; of a signed one the highest bit is the sign, and code 0 is zero."""

    codes: UInt8[Tensor, "rows d_model"]
    scales: Float[Tensor, "rows blocks"]


def block_of(d_model: int) -> int:
    """Dimensions that share a scale: the largest divisor of d_model up to 256, the whole row if that is below 32."""
    block = next(size for size in range(min(d_model, 256), 0, -1) if d_model % size == 0)
    return block if block >= 32 else d_model


def zeros(rows: int, d_model: int, device: torch.device) -> Coded:
    """The codes of a tensor of zeros."""
    codes = torch.zeros(rows, d_model, dtype=torch.uint8, device=device)
    return Coded(codes, torch.zeros(rows, d_model // block_of(d_model), device=device))


def encode_signed(x: Float[Tensor, "rows d_model"], bits: Int[Tensor, "rows d_model"]) -> Coded:
    """The first moment, unbiased: E[decode] = x, each off by less than |x| / 8 or by 2^-15 of its block's largest."""
    y, scales = _scaled(x)
    size, (base, top) = y.abs(), _SIGNED
    low = bits & _LOW
    code = _rounded(size, low, base=base).clamp_max_(top)
    up = low < (size * (2.0**_SHIFT / _LEAST)).int()  # below code 1: that or zero
    code = torch.where(size < _LEAST, up.int(), code)
    return Coded(code.add_((y < 0).int().mul_(128).mul_(code > 0)).to(torch.uint8), scales)


def encode_unsigned(x: Float[Tensor, "rows d_model"], bits: Int[Tensor, "rows d_model"]) -> Coded:
    """The second moment, x >= 0: unbiased from 2^-31 of the block's largest on; below, rounded up to that.

    Never down to zero: a first moment over the root of a lost second one would be a step of any size.
    """
    y, scales = _scaled(x)
    base, top = _UNSIGNED
    code = _rounded(y, bits & _LOW, base=base).clamp_(1, top)
    return Coded(code.mul_(x > 0).to(torch.uint8), scales)


def decode_signed(coded: Coded) -> Float[Tensor, "rows d_model"]:
    """The inverse of `encode_signed`, up to its rounding."""
    code = coded.codes.int()
    value = _value(code & 127, _SIGNED[0])
    return _times(torch.where(code > 127, -value, value), coded.scales)


def decode_unsigned(coded: Coded) -> Float[Tensor, "rows d_model"]:
    """The inverse of `encode_unsigned`, up to its rounding."""
    return _times(_value(coded.codes.int(), _UNSIGNED[0]), coded.scales)


def _value(code: Tensor, base: int) -> Tensor:
    return torch.where(code > 0, ((code + base) << _SHIFT).view(torch.float32), 0.0)


def _rounded(y: Tensor, low: Tensor, *, base: int) -> Tensor:
    """The code of y >= 0 or the one above: 20 random bits are added to the bits that the code lacks."""
    y = y.clamp_max(_TOP)  # x / (x / 1.875) may round past it
    return (y.view(torch.int32) + low).bitwise_right_shift_(_SHIFT).sub_(base)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x divided by its blocks' scales, and the scales: each block's largest element gets the largest code."""
    blocks = x.reshape(x.shape[0], -1, block_of(x.shape[1]))
    scales = blocks.abs().amax(-1).div_(_TOP).clamp_min_(_LEAST_SCALE)
    return (blocks / scales[..., None]).view_as(x), scales


def _times(y: Tensor, scales: Tensor) -> Tensor:
    return y.view(*scales.shape, -1).mul_(scales[..., None]).view_as(y)
