"""How likely a kind of text makes each token, from the text alone: what activations of latents are held against.

A proxy is log P(token | kind) - log P(token), summed over the last tokens of the document, as many as make it largest
(Bricken et al. 2023, "computational proxies"): the evidence for the kind up to here, here 0 where there is none.
"""

import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

NEVER = 1e-10  # probability of what a kind does not have
ALPHABETS = {
    "base64": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
    "dna": "acgt",
    "hex": "0123456789abcdef",
}
SCRIPTS = ("arabic", "hebrew", "cyrillic", "greek", "hangul", "devanagari", "hiragana")


def byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary."""
    printed = [byte for byte in range(256) if chr(byte) in pre_tokenizers.ByteLevel.alphabet() and byte > 32]
    rest = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of each token; none of special ones."""
    alphabet, special = byte_alphabet(), set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [b"" if i in special else bytes(alphabet[char] for char in word) for i, word in enumerate(words)]


def of_alphabet(
    letters: str, words: Sequence[bytes], log_p: Float[np.ndarray, " vocab"]
) -> Float[np.ndarray, " vocab"]:
    """Of strings of letters that are equally likely. White space is layout, and says nothing."""
    each = math.log(1 / len(letters))
    own = {ord(letter): each for letter in letters} | {byte: 0.0 for byte in b" \n\t\r"}
    found = [sum(own.get(byte, math.log(NEVER)) for byte in word) - log_p[i] for i, word in enumerate(words)]
    return np.array([0.0 if not word.strip() else value for word, value in zip(words, found, strict=True)])


def of_scripts(
    documents: Sequence[Int[np.ndarray, " _"]], words: Sequence[bytes]
) -> dict[str, Float[np.ndarray, " vocab"]]:
    """Of each script by Bayes' rule: log P(script | token) - log P(script), where a token may be a part of a letter."""
    length = np.array([len(word) for word in words])
    counts = np.zeros((len(SCRIPTS) + 2, len(words)))  # bytes of each token: of each script, of others, of white space
    for tokens in documents:
        letters = _letters(tokens, words)
        kinds = [_script(letter) for letter in letters]
        sizes = [len(letter.encode("utf-8", "surrogateescape")) for letter in letters]
        np.add.at(counts, (np.repeat(kinds, sizes), np.repeat(tokens, length[tokens])), 1)
    written = counts[:-1].sum(0)
    found = {}
    for name, own in zip(SCRIPTS, counts, strict=False):
        if own.any():
            share = np.maximum(own / np.maximum(written, 1), NEVER)
            found[name] = np.where(written > 0, np.log(share) - math.log(own.sum() / written.sum()), 0.0)
    return found


def of_categories(
    documents: Sequence[tuple[str, Int[np.ndarray, " _"]]], names: Sequence[str], vocab: int
) -> dict[str, Float[np.ndarray, " vocab"]]:
    """Of each category by the tokens of its documents; a token that it lacks counts a tenth."""
    counts: dict[str, np.ndarray] = {name: np.full(vocab, 0.1) for name in names}
    every = np.full(vocab, 0.1)
    for name, tokens in documents:
        own = np.bincount(tokens, minlength=vocab)
        every += own
        if name in counts:
            counts[name] += own
    return {name: np.log(own / own.sum()) - np.log(every / every.sum()) for name, own in counts.items()}


def log_frequency(documents: Sequence[Int[np.ndarray, " _"]], vocab: int) -> Float[np.ndarray, " vocab"]:
    """log P(token); a token that never comes counts a tenth."""
    counts = sum((np.bincount(tokens, minlength=vocab) for tokens in documents), np.full(vocab, 0.1))
    return np.log(counts / counts.sum())


def evidence(
    ratio: Float[np.ndarray, " vocab"], tokens: Int[np.ndarray, "n context"], begins: Bool[np.ndarray, "n context"]
) -> Float[np.ndarray, "n context"]:
    """At each token the largest sum of ratios of the tokens that end there, of its document and sequence; 0 or more."""
    each, found = ratio[tokens], np.zeros(tokens.shape)
    before = np.zeros(len(tokens))
    for at in range(tokens.shape[1]):
        before = np.maximum(np.where(begins[:, at], 0.0, before) + each[:, at], 0.0)
        found[:, at] = before
    return found


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> int:
    """The place of a letter's script in `SCRIPTS`; that of others or of white space behind them."""
    if letter.isspace():
        return len(SCRIPTS) + 1
    name = unicodedata.name(letter, "").partition(" ")[0].lower()
    return SCRIPTS.index(name) if name in SCRIPTS else len(SCRIPTS)


def _letters(tokens: Int[np.ndarray, " _"], words: Sequence[bytes]) -> str:
    """Bytes of letters that are cut stand alone."""
    return b"".join(words[token] for token in tokens).decode("utf-8", "surrogateescape")
