"""Keyed hashes of tokens: random numbers that do not depend on the order or size of batches."""

import torch
from jaxtyping import Int
from torch import Tensor

_MASK64 = (1 << 64) - 1


def _signed(word: int) -> int:
    """The 64-bit word as torch's int64 stores it."""
    return word - (1 << 64) if word >> 63 else word


def mix(words: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """A bijection of 64-bit words in which every input bit moves every output bit (splitmix64; Steele et al. 2014)."""
    words = (words ^ _shifted(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shifted(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shifted(words, 31)


def _shifted(words: Int[Tensor, "*n"], bits: int) -> Int[Tensor, "*n"]:
    return (words >> bits) & (_MASK64 >> bits)  # torch shifts arithmetically; the mask makes it logical


def token_hash(doc: Int[Tensor, " rows"], pos: Int[Tensor, " rows"], *, seed: int) -> Int[Tensor, " rows"]:
    """A 64-bit word for each token of the corpus, named by document and position."""
    start = mix(torch.tensor(_signed((seed + 0x9E3779B97F4A7C15) & _MASK64)))
    return mix(mix(doc ^ start) + pos)


def unsigned(words: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The upper 63 bits, so that signed comparison orders them."""
    return _shifted(words, 1)
