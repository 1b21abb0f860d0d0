"""Keyed permutations without state: the same numbers on every machine and in every version of numpy.

mix64 is the finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), a
bijection of 64-bit words. A permutation sorts 0..n-1 by a keyed hash, so no generator has to be replayed.
"""

import numpy as np
from jaxtyping import Int64, UInt64

MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def mix64(values: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The splitmix64 output function, elementwise modulo 2^64."""
    z = values + np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key from several integers; order matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix64(state ^ np.uint64(part & MASK))
    return int(state[0])


def permutation(n: int, key: int) -> Int64[np.ndarray, " n"]:
    """The keyed permutation of 0..n-1: by hash, whose lowest bits give way to the number itself.

    So no two words are equal and any sort gives the same; sorting words is ten times as fast as a stable argsort.
    """
    low = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    number = np.arange(n, dtype=np.uint64)
    words = (mix64(number ^ np.uint64(key)) & ~low) | number
    words.sort()
    return (words & low).astype(np.int64)
