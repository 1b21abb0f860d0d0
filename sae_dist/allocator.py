"""How this process keeps memory: glibc's allocator told not to give back what the next layer will ask for again."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # mallopt's names, malloc.h
_GIB = 2**30


def keep_freed_memory() -> bool:
    """From now on freed memory stays with the process; whether the C library could be told so.

    A model on a CPU allocates and frees the same tensors of some MB in every layer. By default glibc gives them back
    and the kernel zeroes their pages anew for the next: 6,000 to 20,000 page faults and some 8 % of the processor time
    of a forward pass of 16 x 128 tokens through ten layers of SmolLM2. One arena, because those of other threads than
    the first give their memory back whatever they are told. The process stays as large as it once was.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    told = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _GIB), (_TRIM_THRESHOLD, 2 * _GIB - 1), (_TOP_PAD, _GIB // 4))
    return all([mallopt(name, value) == 1 for name, value in told])
