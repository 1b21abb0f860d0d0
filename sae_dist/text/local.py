"""Text on a local disk: which files, how they are opened and decoded, and a fingerprint of what they hold."""

import bz2
import contextlib
import gzip
import io
import logging
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import xxhash

from sae_dist.config import UserError, digest

logger = logging.getLogger(__name__)

COMPRESSION = (".gz", ".bz2", ".xz")
CHUNK_CHARS = 1 << 20
HASHED_BYTES = 4 << 30  # a corpus beyond this is known by sizes and times: hashing it would take longer than using it
_UNDECODABLE = re.compile("[\udc80-\udcff]")


def find(path: str, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, file) of every file at `path`, by name; a folder is searched below for `suffixes`, hidden files aside.

    Names start at the folder's own name, so that a corpus that was moved keeps its origins and its order.
    """
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(f"text.path={path!r} does not exist; give a local file or folder: text.path=FOLDER")
    if not root.is_dir():
        return [(root.name, root)]
    base = root.resolve()
    wanted = tuple(suffixes) + tuple(s + c for s in suffixes for c in COMPRESSION)
    found = [
        (f"{base.name}/{file.relative_to(base).as_posix()}", file)
        for file in base.rglob("*")
        if file.name.lower().endswith(wanted)
        and not any(part.startswith(".") for part in file.relative_to(base).parts)
        and file.is_file()
    ]
    if not found:
        raise UserError(f"text.path={path!r} has no file that ends in {', '.join(suffixes)}; set text.suffixes=[...]")
    return sorted(found)


def open_bytes(path: Path) -> IO[bytes]:
    """`path` opened for reading, decompressed by its suffix."""
    match path.suffix:
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".bz2":
            return cast(IO[bytes], bz2.open(path, "rb"))
        case ".xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        case _:
            return path.open("rb")


def read_chunks(path: Path, name: str, counts: Counter[str]) -> Iterator[str]:
    """The UTF-8 text of `path`, in chunks; bytes that are none become U+FFFD and are counted in one warning.

    A file with such bytes is one more `undecodable` document in `counts`.
    """
    broken = 0
    with _reading(path, name) as binary:
        # surrogateescape marks exactly the undecodable bytes; "replace" could not tell them from a U+FFFD of the text
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline=None)
        while chunk := text.read(CHUNK_CHARS):
            valid, n = _UNDECODABLE.subn("\ufffd", chunk)
            broken += n
            yield valid
    if broken:
        counts["undecodable"] += 1
        logger.warning("%s: %d bytes are not UTF-8; each was replaced by U+FFFD", name, broken)


def read_lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of `path`."""
    with _reading(path, name) as binary:
        yield from enumerate(binary, start=1)


def fingerprint(files: Sequence[tuple[str, Path]]) -> str:
    """Digest of names and contents; of names, sizes and modification times where there are more than 4 GiB."""
    stats = [file.stat() for _, file in files]
    if sum(stat.st_size for stat in stats) > HASHED_BYTES:
        return digest([(name, stat.st_size, stat.st_mtime_ns) for (name, _), stat in zip(files, stats, strict=True)])
    return digest([(name, _content_hash(file)) for name, file in files])


def _content_hash(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as binary:
        while block := binary.read(1 << 20):
            state.update(block)
    return state.hexdigest()


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[IO[bytes]]:
    """`path` open; what can go wrong while it is read (a truncated archive, a missing permission) is said by name."""
    try:
        with open_bytes(path) as binary:
            yield binary
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"text file {name} cannot be read ({error}); repair it or take it out") from None
