"""Parquet files: one column is the text; one row group at a time is in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sae_dist.config import UserError, digest, frozen
from sae_dist.text import chat, local_files
from sae_dist.text.chat import Conversations
from sae_dist.text.document import Document, shuffled_parts

BATCH_ROWS = 1024


@frozen
class ParquetText(Conversations):
    """Each row is a document."""

    kind: Literal["parquet"] = "parquet"
    path: str = ""
    """A file or a folder, searched below."""
    suffixes: tuple[str, ...] = (".parquet",)
    """Which files of a folder are read."""
    column: str = "text"
    """The column that holds the text."""
    category: str = ""
    """The column that labels a document; empty: none."""


def documents(config: ParquetText, seed: int | None) -> Iterator[Document]:
    groups = []
    for name, path in local_files.find(config.path, config.suffixes):
        with _open(path, name) as file:
            _check(file.schema_arrow, config, name)
            row = 0
            for group in range(file.num_row_groups):
                groups.append((name, path, group, row))
                row += file.metadata.row_group(group).num_rows
    for name, path, group, row in shuffled_parts(groups, seed):
        for batch in _batches(path, name, config, group):
            found = _values(batch, config.messages or config.column, name, row)
            labels = _values(batch, config.category, name, row) if config.category else [None] * len(found)
            for content, label in zip(found, labels, strict=True):
                source, category = f"{name}:{row}", None if label is None else str(label)
                if config.messages:
                    yield chat.document(content, source, category)
                else:
                    yield Document(content or "", source, category)
                row += 1


def _batches(path: Path, name: str, config: ParquetText, group: int) -> Iterator[pa.RecordBatch]:
    columns = list(dict.fromkeys(_columns(config).values()))  # one may be both
    try:
        with _open(path, name) as file:
            yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"text file {name} is damaged ({_first_line(error)}); replace it") from None


def _values(batch: pa.RecordBatch, column: str, name: str, first: int) -> list[Any]:
    """A column as Python's values; UserError with the row, counted from `first`, where a text is not UTF-8."""
    found = []
    try:
        for value in batch.column(column):
            found.append(value.as_py())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}:{first + len(found)} has bytes in column {column!r} that are not UTF-8 ({error.reason}); write "
            "the file again with text in UTF-8, or take the row out"
        ) from None
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _columns(config: ParquetText) -> dict[str, str]:
    """The columns that are read, by the keys that name them."""
    content = {"messages": config.messages} if config.messages else {"column": config.column}
    return content | ({"category": config.category} if config.category else {})


def fingerprint(config: ParquetText) -> str:
    files = local_files.find(config.path, config.suffixes)
    return digest([config.column, config.category, *config.chat_fingerprint, local_files.fingerprint(files)])


def _open(path: Path, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"text file {name} is not Parquet ({_first_line(error)}); replace it") from None


def _check(schema: pa.Schema, config: ParquetText, name: str) -> None:
    for key, column in _columns(config).items():
        if column not in schema.names:
            raise UserError(f"{name} has no column {column!r}; it has {', '.join(schema.names)}; set text.{key}=")
    if config.messages:
        return  # every row's conversation is checked as it is read
    kind = schema.field(config.column).type
    types = pa.types
    if not any(
        is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_string_view, types.is_dictionary)
    ):
        raise UserError(
            f"{name}: column {config.column!r} holds {kind}, not text; set text.column= to a text column, or "
            f"text.messages={config.column} for conversations"
        )
