"""Plain text files: a file, or a folder of them."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, assert_never

from sae_dist.config import UserError, digest, frozen
from sae_dist.text import local_files, reading
from sae_dist.text.document import MAX_CHARS, Document, cut, separated, shuffled_parts

logger = logging.getLogger(__name__)


@frozen
class FilesText:
    """Each file is a document, or several with a separator between them.

    A document of more than a million characters is cut into pieces.
    """

    kind: Literal["files"] = "files"
    path: str = ""
    """A file or a folder, searched below."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst")
    """Which files of a folder are text; each also with .gz, .bz2, .xz or .zst behind it."""
    separator: str = ""
    """What stands between two documents of a file, as "<|endoftext|>" or "\\n\\n"; empty: a file is one document."""
    category: Literal["none", "folder", "suffix"] = "none"
    """What labels a document: nothing, the folder that its file is in, or the file's suffix."""


def documents(config: FilesText, seed: int | None, counts: Counter[str]) -> Iterator[Document]:
    for name, path in shuffled_parts(local_files.find(config.path, config.suffixes), seed):
        category = _category(config, name)
        for number, text in separated(_plain_text(config, name, path, counts), _separator(config)):
            source = f"{name}#{number}" if config.separator else name
            n_pieces = 0
            for i, (piece, whole) in enumerate(cut(text, MAX_CHARS)):
                yield Document(piece, f"{source}[{i}]" if i else source, category, whole)
                n_pieces += 1
            counts["empty"] += n_pieces == 0
            counts["cut"] += n_pieces > 1


def fingerprint(config: FilesText) -> str:
    divided_by = [_separator(config)] if config.separator else []  # none: what it was before there were separators
    return digest(
        [config.category, *divided_by, local_files.fingerprint(local_files.find(config.path, config.suffixes))]
    )


def _separator(config: FilesText) -> str:
    return config.separator.replace("\\n", "\n")  # a command line spells a line break with two characters


def _plain_text(config: FilesText, name: str, path: Path, counts: Counter[str]) -> Iterator[str]:
    """The file's text; UserError for JSON lines, unless `suffixes` names such files."""
    chunks = reading.read_chunks(path, name, counts)
    first = next(chunks, "")
    if reading.holds_json_lines(first[: reading.HEAD_BYTES]):
        if not local_files.suffix_of(path, config.suffixes):
            raise UserError(
                f"text file {name} holds JSON lines; set text=jsonl text.path={config.path}, or "
                f"text.suffixes=[{local_files.plain_name(path).suffix}] to take keys and quotes for text too"
            )
        logger.warning("%s looks like JSON lines and is read as plain text; text=jsonl reads its documents", name)
    return itertools.chain([first], chunks)


def _category(config: FilesText, name: str) -> str | None:
    folder, _, file = name.rpartition("/")
    match config.category:
        case "none":
            return None
        case "folder":
            return folder.rpartition("/")[2] or None
        case "suffix":
            return local_files.plain_name(Path(file)).suffix.removeprefix(".") or None
    assert_never(config.category)
