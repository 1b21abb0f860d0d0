"""Triton's interpreter with the bf16 of a GPU, for tests and for the processes that they start."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def bf16_as_on_a_gpu() -> Iterator[None]:
    """The interpreter holds bf16 as 16-bit integers, would multiply those, and cuts fp32 off where a GPU rounds."""
    builder = interpreter.InterpreterBuilder
    original, original_cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, handle, to):
        if handle.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return original_cast(self, handle, to)
        bits = handle.data.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return interpreter.TensorHandle(rounded.astype(np.uint16), to.scalar)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        builder.create_dot, builder.cast_impl = original, original_cast
