"""The documents of the configured text source, and a fingerprint of them."""

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
    """Yields every document that is not empty, in the source's order, the same each time.

    `counts` counts documents that are changed: `empty` ones are left out, very long ones are `cut` into pieces, and in
    `undecodable` ones bytes that are not UTF-8 become U+FFFD.

    With a `seed`, the parts of a source (files, row groups, blocks of rows) are shuffled by it, so that the beginning
    of a sorted corpus is a sample of it.
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
    """Changes with the text, its order, its sources and its labels, but not when a folder is moved."""
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
