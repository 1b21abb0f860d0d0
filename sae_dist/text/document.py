"""A document: the unit of text with a source and a category; it is either trained on or held out."""

import itertools
import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import xxhash

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_CHARS = 1_000_000  # longer documents are cut: a tokenizer needs some 50 bytes a character
SIDE_CHARS = 100_000  # characters of a document's beginning that decide its side of the split: documents are streamed
_SURROGATES = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    text: str
    source: str  # where it was read, relative to the corpus, e.g. "notes/a.txt[1]" or "web.jsonl:17"
    category: str | None
    parent_key: int | None = None  # of a piece: the `split_key` of the document that it was cut from
    messages: Sequence[Mapping[str, Any]] | None = None  # of a conversation, whose `text` only tells it from others


def normal(text: str) -> str:
    """The text with single spaces, without case, in one Unicode form: equal for copies that differ only in these."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text.replace("\ufeff", ""))
    return " ".join(folded.casefold().split())


def doc_id(text: str) -> int:
    """A document's id, the hash of its `normal` form."""
    return xxhash.xxh3_64_intdigest(normal(text).encode())


def split_key(text: str) -> int:
    """The hash that decides the side of a document: of the first `SIDE_CHARS` characters of its `normal` form."""
    return xxhash.xxh3_64_intdigest(normal(text)[:SIDE_CHARS].encode())


def shuffled_parts(parts: Iterable[T], seed: int | None) -> list[T]:
    """`parts` shuffled by `seed`; in their own order if it is None."""
    ordered = list(parts)
    if seed is not None:
        random.Random(seed).shuffle(ordered)
    return ordered


def pieces(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """Cuts the text of `chunks` into pieces of at most `limit` characters; joined, they are the text.

    A cut comes after the last empty line, line break or space in the second half of a piece, in this order of
    preference. At most `limit` characters and one chunk are in memory.
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
    """Splits the text of `chunks` at `separator` into (number from 0, chunks) of each document.

    As with `itertools.groupby`, a document's chunks must be read before the next document is requested.
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
        whole = max(0, len(held) - max(0, len(separator) - 1))  # the rest may be the start of a separator
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
    """Yields `document` as valid Unicode, in pieces of at most `MAX_CHARS`; nothing if it is empty.

    `counts` counts documents that were changed: `undecodable`, `empty` or `cut`. One whose source alone was changed is
    not counted: that is the name of a file, and the same for all of its documents.
    """
    document, broken = _valid(document)
    text = document.text
    if broken:
        counts["undecodable"] += 1
        logger.warning("%s: %d undecodable characters replaced by U+FFFD", document.source, broken)
    if not text or text.isspace():
        counts["empty"] += 1
        return
    if len(text) <= MAX_CHARS or document.messages is not None:  # a conversation is not a text that may be cut
        yield document
        return
    counts["cut"] += 1
    for i, (piece, whole) in enumerate(cut([text], MAX_CHARS)):
        if not piece.isspace():
            yield Document(piece, f"{document.source}[{i}]", document.category, whole)


def _valid(document: Document) -> tuple[Document, int]:
    """The document without lone surrogates, and how many its content and its category had."""
    text, in_text = _replaced(document.text)
    messages, in_messages = _replaced(document.messages)
    category, in_category = _replaced(document.category)
    source, _ = _replaced(document.source)
    broken = in_category + (in_text if messages is None else in_messages)  # the text of a conversation repeats it
    return document._replace(text=text, source=source, category=category, messages=messages), broken


def _replaced(value: Any) -> tuple[Any, int]:
    """`value` with U+FFFD for each lone surrogate in its texts, which UTF-8 cannot hold, and how many those were."""
    if isinstance(value, str):
        return _SURROGATES.subn("\ufffd", value)
    if isinstance(value, Mapping):
        pairs, broken = _replaced(list(value.items()))
        return dict(pairs), broken
    if isinstance(value, list | tuple):
        found = [_replaced(each) for each in value]
        return [each for each, _ in found], sum(broken for _, broken in found)
    return value, 0
