"""JSON lines: an object a line, one field of which is the text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sae_dist.config import UserError, digest, frozen
from sae_dist.text import chat, local_files, reading
from sae_dist.text.chat import Conversations
from sae_dist.text.document import Document, shuffled_parts

LABELLED_WITHIN = 10_000  # records of a file, one of which has the label at least
Record = tuple[str, dict[str, object]]  # source, fields


@frozen
class JsonlText(Conversations):
    """Each line is a document."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = ""
    """A file or a folder, searched below."""
    suffixes: tuple[str, ...] = (".jsonl", ".ndjson")
    """Which files of a folder are read; each also with .gz, .bz2, .xz or .zst behind it."""
    field: str = "text"
    """The field that holds the text."""
    category: str = ""
    """The field that labels a document; empty: none."""


def documents(config: JsonlText, seed: int | None) -> Iterator[Document]:
    for name, path in shuffled_parts(local_files.find(config.path, config.suffixes), seed):
        if reading.first_bytes(path, name).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise UserError(
                f"text file {name} is a JSON array; make it an object a line: jq -c '.[]' IN.json > OUT.jsonl"
            )
        for source, record in _labelled(_records(path, name), name, config.category):
            category = _category(record, config)
            if config.messages:
                yield chat.document(record.get(config.messages), source, category)
            else:
                yield Document(_text(record, config, source), source, category)


def fingerprint(config: JsonlText) -> str:
    files = local_files.find(config.path, config.suffixes)
    return digest([config.field, config.category, *config.chat_fingerprint, local_files.fingerprint(files)])


def _records(path: Path, name: str) -> Iterator[Record]:
    for number, line in reading.read_lines(path, name):
        if not line.isspace():
            source = f"{name}:{number}"
            yield source, _parse(line, source)


def _labelled(records: Iterator[Record], name: str, label: str) -> Iterator[Record]:
    """`records`; UserError where none of the file's, or of its first ones, has the field of the label.

    A name that is mistyped would leave all documents without a label.
    """
    without, fields = 0, list[str]()
    for source, record in records:
        yield source, record
        if not label or label in record:
            yield from records  # of the others some may lack it
            return
        without, fields = without + 1, list(record)
        if without == LABELLED_WITHIN:
            break
    if without:
        raise UserError(
            f"none of the first {without:,} records of {name} has the field {label!r}; their fields: "
            f"{', '.join(fields)}; set text.category= to one of them, or put it into the file, null where there is none"
        )


def _parse(line: bytes, source: str) -> dict[str, object]:
    # bytes that are not UTF-8 become lone surrogates, which `clean` counts, names and replaces
    text = line.decode("utf-8-sig", "surrogateescape")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not JSON ({error.msg}, column {error.colno}); one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{source} cannot be read as JSON ({error}); take the line out") from None
    if not isinstance(record, dict):
        raise UserError(f"{source} holds a {type(record).__name__}, not an object; one object a line")
    return record


def _text(record: dict[str, object], config: JsonlText, source: str) -> str:
    text = record.get(config.field)
    if text is None and config.field in record:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{source} has no text in field {config.field!r}; its fields: {', '.join(record)}; set text.field=, or "
            "text.messages= for conversations"
        )
    return text


def _category(record: dict[str, object], config: JsonlText) -> str | None:
    label = record.get(config.category) if config.category else None
    return None if label is None else str(label)
