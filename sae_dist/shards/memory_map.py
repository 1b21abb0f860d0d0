"""Bytes of a local file as an array that is the file itself."""

import mmap
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8


def map_bytes(path: Path, start: int, length: int) -> UInt8[np.ndarray, " bytes"]:
    """`length` bytes from `start`, mapped; empty if the file does not reach that far (a mapping past it is SIGBUS).

    Each slice has its own mapping, so its pages leave the process when the slice does. The mapping is private: torch
    may then call it writable, and nobody can write through it.
    """
    if length == 0:
        return np.empty(0, np.uint8)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must not be waited for
    try:
        if os.fstat(file).st_size < start + length:
            return np.empty(0, np.uint8)
        # Not madvise, which asks for the same but keeps the interpreter's lock while the disk is at work.
        os.posix_fadvise(file, page, start + length - page, os.POSIX_FADV_WILLNEED)
        mapped = mmap.mmap(file, start + length - page, access=mmap.ACCESS_COPY, offset=page)
    finally:
        os.close(file)
    return np.frombuffer(mapped, np.uint8)[start - page :]
