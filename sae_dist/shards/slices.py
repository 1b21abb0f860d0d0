"""A slice of a shard: bytes that were fetched become columns without a copy."""

import functools
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Shaped, UInt8, UInt32, UInt64
from torch import Tensor

from sae_dist.shards import format, quantize
from sae_dist.shards.commits import SliceRef
from sae_dist.shards.memory_map import map_bytes
from sae_dist.storage import Storage

_F4 = np.dtype("<f4")
_IDS = (("doc", np.dtype("<u8")), ("pos", np.dtype("<u4")), ("token", np.dtype("<u4")))


class Slice(NamedTuple):
    """The rows of one record batch; `bits` is a view of the file (or of the bytes that came), not a copy."""

    bits: Shaped[Tensor, "rows width"]
    scale: Float[Tensor, " rows"] | None
    doc: UInt64[np.ndarray, " rows"]
    pos: UInt32[np.ndarray, " rows"]
    token: UInt32[np.ndarray, " rows"]
    dtype: format.DType

    @property
    def x(self) -> Shaped[Tensor, "rows width"]:
        """The activations: a view for plain dtypes, dequantised to bfloat16 for int8 and fp8."""
        return self.rows(slice(None))

    def rows(self, which: slice) -> Shaped[Tensor, "some width"]:
        """Some of them."""
        return quantize.decode(self.bits[which], None if self.scale is None else self.scale[which], self.dtype)


def fetch(storage: Storage, key: str, ref: SliceRef) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of a slice as they lie there: the file itself where it is a local one."""
    path = storage.local_path(key)
    if path is None:
        data = storage.read(key, ref.offset, ref.bytes)
        return np.frombuffer(bytearray(data) if isinstance(data, bytes) else data, np.uint8)  # writable, for torch
    return map_bytes(path, ref.offset, ref.bytes)


def parse(data: UInt8[np.ndarray, " bytes"], schema: pa.Schema, dtype: format.DType, shape: tuple[int, int]) -> Slice:
    """The slice in its verified bytes; ValueError or ArrowException when they are no record batch of that shape."""
    message = pa.ipc.read_message(pa.BufferReader(pa.py_buffer(data)))
    batch = pa.ipc.read_record_batch(message, schema)
    base = data.__array_interface__["data"][0]

    def column(array: pa.Array, numpy_dtype: np.dtype, count: int) -> np.ndarray:
        start = array.buffers()[-1].address - base  # by address: a view through Arrow would be read-only
        return data[start : start + count * numpy_dtype.itemsize].view(numpy_dtype)

    element, (rows, width) = format.ELEMENTS[dtype], shape
    if batch.num_rows != rows:
        raise ValueError(f"it holds {batch.num_rows}")
    raw = column(batch["act"].values, _numpy(element.stored), rows * width).reshape(rows, width)
    scale = torch.from_numpy(column(batch["scale"], _F4, rows)) if element.scaled else None
    doc, pos, token = (column(batch[name], kind, rows) for name, kind in _IDS)
    return Slice(torch.from_numpy(raw), scale, doc, pos, token, dtype)


@functools.cache
def _numpy(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype
