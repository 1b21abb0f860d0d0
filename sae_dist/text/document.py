"""A document: the unit of text that has an origin, a category, and a place on one side of the held-out split."""

import itertools
import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import xxhash

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_CHARS = 1_000_000  # a tokenizer needs some 50 bytes a character, so one document must not be a whole library
SIDE_CHARS = 100_000  # of a document's beginning decide its side: what streams past cannot be hashed to its end first
_SURROGATES = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    text: str
    source: str  # where it was read, relative to the corpus, e.g. "notes/a.txt[1]" or "web.jsonl:17"
    category: str | None
    parent_key: int | None = None  # of a piece: the `split_key` of the document that it was cut from


def normal(text: str) -> str:
    """What two copies of a text have in common: white space is one space, letters have one case and one form."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text.replace("\ufeff", ""))
    return " ".join(folded.casefold().split())


def doc_id(text: str) -> int:
    """A document's name: equal for copies that differ in white space, letter case or Unicode form only."""
    return xxhash.xxh3_64_intdigest(normal(text).encode())


def split_key(text: str) -> int:
    """The hash that decides the side of a document: of the first `SIDE_CHARS` characters of its `normal` form."""
    return xxhash.xxh3_64_intdigest(normal(text)[:SIDE_CHARS].encode())


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
            end = _end(held, start, start + limit)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def separated(chunks: Iterable[str], separator: str) -> Iterator[tuple[int, Iterator[str]]]:
    """(number from 0, chunks) of each document in the text that `chunks` spell, wherever chunks end.

    As with `itertools.groupby`, a document's chunks are gone once the next document is asked for.
    """
    for number, parts in itertools.groupby(_numbered(chunks, separator), key=lambda part: part[0]):
        yield number, (text for _, text in parts)


def _numbered(chunks: Iterable[str], separator: str) -> Iterator[tuple[int, str]]:
    """(number of the document, part of it); a part may be empty, and every document has one."""
    number, held = 0, ""
    for chunk in chunks:
        *ended, held = (held + chunk).split(separator) if separator else [chunk]
        for text in ended:
            yield number, text
            number += 1
        whole = max(0, len(held) - max(0, len(separator) - 1))  # the rest may be the beginning of a separator
        yield number, held[:whole]
        held = held[whole:]
    yield number, held


def cut(chunks: Iterable[str], limit: int) -> Iterator[tuple[str, int | None]]:
    """(piece, `whole`) for the pieces of one document; `whole` is None where the only piece is the document."""
    arriving, head, n_chars = iter(chunks), [], 0
    for chunk in arriving:
        head.append(chunk)
        n_chars += len(normal(chunk))
        if n_chars > SIDE_CHARS:
            break
    found = pieces(itertools.chain(head, arriving), limit)
    first, second = next(found, None), next(found, None)
    if first is None:
        return
    if second is None:
        yield first, None
        return
    whole = split_key("".join(head))
    for piece in itertools.chain([first, second], found):
        yield piece, whole


def _end(text: str, start: int, end: int) -> int:
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
    for i, (piece, whole) in enumerate(cut([text], MAX_CHARS)):
        if not piece.isspace():
            yield Document(piece, f"{document.source}[{i}]", document.category, whole)
