"""Plain text files: a file, or a folder of them."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, assert_never

from sae_dist.config import digest, frozen
from sae_dist.text import local
from sae_dist.text.document import MAX_CHARS, Document, pieces, shuffled_parts


@frozen
class FilesText:
    """Each file is a document; one of more than a million characters is cut into several."""

    kind: Literal["files"] = "files"
    path: str = ""
    """A file or a folder, searched below."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst")
    """Which files of a folder are text; each also with .gz, .bz2 or .xz behind it."""
    category: Literal["none", "folder", "suffix"] = "none"
    """What labels a document: nothing, the folder that its file is in, or the file's suffix."""


def documents(config: FilesText, seed: int | None, counts: Counter[str]) -> Iterator[Document]:
    for name, path in shuffled_parts(local.find(config.path, config.suffixes), seed):
        category = _category(config, name)
        n_pieces = 0
        for i, piece in enumerate(pieces(local.read_chunks(path, name, counts), MAX_CHARS)):
            yield Document(piece, f"{name}[{i}]" if i else name, category)
            n_pieces += 1
        counts["empty"] += n_pieces == 0
        counts["cut"] += n_pieces > 1


def fingerprint(config: FilesText) -> str:
    return digest([config.category, local.fingerprint(local.find(config.path, config.suffixes))])


def _category(config: FilesText, name: str) -> str | None:
    folder, _, file = name.rpartition("/")
    match config.category:
        case "none":
            return None
        case "folder":
            return folder.rpartition("/")[2] or None
        case "suffix":
            suffix = next((c for c in local.COMPRESSION if file.endswith(c)), "")
            return file.removesuffix(suffix).rpartition(".")[2]
    assert_never(config.category)
