"""Activations to the bits that a store keeps, and back: plain dtypes are a cast, int8 and fp8 have a scale per row."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sae_dist.shards.format import ELEMENTS, DType

LARGEST = {"int8": 127.0, "float8_e4m3": 448.0}


class Encoded(NamedTuple):
    """Rows as stored; `scale` is None for plain dtypes."""

    bits: Shaped[Tensor, "rows width"]
    scale: Float[Tensor, " rows"] | None


def encode(x: Float[Tensor, "rows width"], dtype: DType) -> Encoded:
    """Absmax per row: scale = max |x| / largest, stored = round(x / scale)."""
    element = ELEMENTS[dtype]
    if not element.scaled:
        return Encoded(x.to(element.view).contiguous().view(element.stored), None)
    largest = LARGEST[dtype]
    rows = x.float()
    scale = rows.abs().amax(1) / largest
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays a row of zeros
    scaled = (rows / scale[:, None]).clamp(-largest, largest)
    if dtype == "int8":
        scaled = scaled.round()
    return Encoded(scaled.to(element.view).view(element.stored), scale)


def decode(bits: Shaped[Tensor, "rows width"], scale: Float[Tensor, " rows"] | None, dtype: DType) -> Tensor:
    """The rows: the stored dtype itself where it is a float, bfloat16 where it is quantised.

    The product is taken in fp32; rounding it to bfloat16 adds an error of 4e-6, 1 % of that of int8.
    """
    x = bits.view(ELEMENTS[dtype].view)
    return x if scale is None else (x.float() * scale[:, None]).bfloat16()


def batch_dtype(dtype: DType) -> torch.dtype:
    """The dtype of `decode`."""
    return torch.bfloat16 if ELEMENTS[dtype].scaled else ELEMENTS[dtype].view


def squared_error(x: Float[Tensor, "rows width"], encoded: Encoded, dtype: DType) -> tuple[float, float]:
    """(sum ||x - stored||^2, sum ||x||^2), in fp32 rows and fp64 totals."""
    stored = encoded.bits.view(ELEMENTS[dtype].view).float()
    if encoded.scale is not None:
        stored = stored * encoded.scale[:, None]
    rows = x.float()
    error = rows - stored
    return (
        float(torch.linalg.vecdot(error, error).double().sum()),
        float(torch.linalg.vecdot(rows, rows).double().sum()),
    )
