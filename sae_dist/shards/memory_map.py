"""Bytes of a local file as a memory-mapped array."""

import mmap
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8


def map_bytes(path: Path, start: int, length: int) -> UInt8[np.ndarray, " bytes"]:
    """`length` bytes from `start`, memory-mapped; empty if the file is shorter (access past its end would be SIGBUS).

    Each call makes its own mapping, so memory is freed with the array. The mapping is private: the array is writable,
    as torch wants it, but the file never changes.
    """
    if length == 0:
        return np.empty(0, np.uint8)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must not block
    try:
        if os.fstat(file).st_size < start + length:
            return np.empty(0, np.uint8)
        # Not madvise, which does the same but keeps the interpreter's lock while the disk works.
        os.posix_fadvise(file, page, start + length - page, os.POSIX_FADV_WILLNEED)
        mapped = mmap.mmap(file, start + length - page, access=mmap.ACCESS_COPY, offset=page)
    finally:
        os.close(file)
    return np.frombuffer(mapped, np.uint8)[start - page :]
