"""Bytes of a local file as an array that is the file itself."""

import mmap
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
    with path.open("rb") as file:
        if path.stat().st_size < start + length:
            return np.empty(0, np.uint8)
        mapped = mmap.mmap(file.fileno(), start + length - page, access=mmap.ACCESS_COPY, offset=page)
    mapped.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(mapped, np.uint8)[start - page :]
