"""Text by configuration: which sources there are, their documents, and a fingerprint of what they say."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, assert_never

from pydantic import Field

from sae_dist.config import digest
from sae_dist.text import builtin, files, huggingface, jsonl, parquet
from sae_dist.text.builtin import BuiltinText
from sae_dist.text.document import Document, clean
from sae_dist.text.files import FilesText
from sae_dist.text.huggingface import HuggingfaceText
from sae_dist.text.jsonl import JsonlText
from sae_dist.text.parquet import ParquetText

TextConfig = Annotated[BuiltinText | FilesText | JsonlText | ParquetText | HuggingfaceText, Field(discriminator="kind")]


def documents(config: TextConfig, *, seed: int | None = None, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Every document that is not empty, streamed, in the source's own order, the same each time.

    One outcome for bad text each, and a count of it in `counts`: an `empty` document is left out, a huge one is `cut`
    into pieces, and of an `undecodable` one the bytes that are no UTF-8 become U+FFFD.

    With a `seed` the parts of a source (files, row groups, blocks of rows) come in an order that is a function of it,
    so that a beginning of a sorted corpus is a sample of it.
    """
    counts = Counter() if counts is None else counts
    match config:
        case BuiltinText():
            found = builtin.documents(config)
        case FilesText():
            found = files.documents(config, seed, counts)
        case JsonlText():
            found = jsonl.documents(config, seed)
        case ParquetText():
            found = parquet.documents(config, seed)
        case HuggingfaceText():
            found = huggingface.documents(config, seed)
        case _:
            assert_never(config)
    for document in found:
        yield from clean(document, counts)


def fingerprint(config: TextConfig) -> str:
    """Changes when the text, its order, its origins or its labels would; not when a folder is moved."""
    match config:
        case BuiltinText():
            known = builtin.fingerprint(config)
        case FilesText():
            known = files.fingerprint(config)
        case JsonlText():
            known = jsonl.fingerprint(config)
        case ParquetText():
            known = parquet.fingerprint(config)
        case HuggingfaceText():
            known = huggingface.fingerprint(config)
        case _:
            assert_never(config)
    return digest([config.kind, known])
