"""The texts of one source, by kind: their documents, and a fingerprint of them."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, assert_never

from pydantic import Field

from sae_dist.text import builtin, files, huggingface, jsonl, parquet
from sae_dist.text.builtin import BuiltinText
from sae_dist.text.document import Document
from sae_dist.text.files import FilesText
from sae_dist.text.huggingface import HuggingfaceText
from sae_dist.text.jsonl import JsonlText
from sae_dist.text.parquet import ParquetText

SingleText = Annotated[BuiltinText | FilesText | JsonlText | ParquetText | HuggingfaceText, Field(discriminator="kind")]


def documents(config: SingleText, seed: int | None, counts: Counter[str]) -> Iterator[Document]:
    """The documents as they are read, those of a corpus in parts that are shuffled by the seed."""
    match config:
        case BuiltinText():
            return builtin.documents(config)
        case FilesText():
            return files.documents(config, seed, counts)
        case JsonlText():
            return jsonl.documents(config, seed)
        case ParquetText():
            return parquet.documents(config, seed)
        case HuggingfaceText():
            return huggingface.documents(config, seed)
        case _:
            assert_never(config)


def fingerprint(config: SingleText) -> list[str]:
    """[kind, fingerprint of the text]."""
    match config:
        case BuiltinText():
            return [config.kind, builtin.fingerprint(config)]
        case FilesText():
            return [config.kind, files.fingerprint(config)]
        case JsonlText():
            return [config.kind, jsonl.fingerprint(config)]
        case ParquetText():
            return [config.kind, parquet.fingerprint(config)]
        case HuggingfaceText():
            return [config.kind, huggingface.fingerprint(config)]
        case _:
            assert_never(config)
