"""Tokens as people read them: text, or the raw bytes of a token that is only a part of a character."""

import re
from collections.abc import Callable
from typing import Protocol

Decode = Callable[[int], str | bytes]

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int]) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def decoder(tokenizer: Tokenizer) -> Decode:
    """A function from a token id to its text, or to its bytes when they are no whole characters."""
    alphabet = _byte_alphabet()

    def decode(token: int) -> str | bytes:
        text = tokenizer.decode([token])
        if "\ufffd" not in text:
            piece = tokenizer.convert_ids_to_tokens(token)
            return " " + text if piece.startswith("\u2581") and not text.startswith(" ") else text
        piece = tokenizer.convert_ids_to_tokens(token)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if not all(c in alphabet for c in piece):
            return text
        raw = bytes(alphabet[c] for c in piece)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    return decode
