"""A document: the unit of text that has an origin, a category, and a place on one side of the held-out split."""

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_CHARS = 1_000_000  # a tokenizer needs some 50 bytes a character, so one document must not be a whole library
_SURROGATES = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    text: str
    source: str  # where it was read, relative to the corpus, e.g. "notes/a.txt[1]" or "web.jsonl:17"
    category: str | None


def shuffled_parts(parts: Iterable[T], seed: int | None) -> list[T]:
    """`parts` in an order that is a function of `seed`; in their own where there is none."""
    ordered = list(parts)
    if seed is not None:
        random.Random(seed).shuffle(ordered)
    return ordered


def pieces(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """The text that `chunks` spell, cut into pieces of at most `limit` characters; joined, they are the text.

    A cut falls after the last empty line, line break or space of the second half of a piece, in that order of
    preference. At most `limit` characters and one chunk are held.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > limit:
            end = _cut(held, start, start + limit)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _cut(text: str, start: int, end: int) -> int:
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, (start + end) // 2, end)
        if found >= 0:
            return found + len(separator)
    return end


def clean(document: Document, counts: Counter[str]) -> Iterator[Document]:
    """`document` as valid Unicode, in pieces of at most `MAX_CHARS`; nothing where it is empty.

    `counts` hears of each document that was not taken as it is: `undecodable`, `empty` or `cut`.
    """
    text, broken = _SURROGATES.subn("\ufffd", document.text)
    if broken:
        counts["undecodable"] += 1
        logger.warning("%s: %d undecodable characters replaced by U+FFFD", document.source, broken)
    if not text or text.isspace():
        counts["empty"] += 1
        return
    if len(text) <= MAX_CHARS:
        yield document._replace(text=text)
        return
    counts["cut"] += 1
    for i, piece in enumerate(pieces([text], MAX_CHARS)):
        if not piece.isspace():
            yield Document(piece, f"{document.source}[{i}]", document.category)
