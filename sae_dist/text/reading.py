"""Reads text files: decompresses them by their first bytes, refuses what is not text, decodes."""

import bz2
import contextlib
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sae_dist.config import UserError

logger = logging.getLogger(__name__)

CHUNK_CHARS = 1 << 20
HEAD_BYTES = 1 << 16
NOT_TEXT = 0.4  # share of invalid bytes from which a file is not text; random bytes have 0.58, Latin-1 text some 0.05
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_NO_CHARACTER = re.compile("[\x00-\x08\x0e-\x1f\x7f\udc80-\udcff]")


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa  # here: the command line does without it

    return pa.input_stream(str(path), compression="zstd")


# by the first bytes, not by the name: a browser may have unpacked a file that is still named .gz
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    b"\x50\x2a\x4d\x18": _open_zstd,  # a frame to be skipped; pzstd begins with one
}


def open_bytes(path: Path) -> io.BufferedReader:
    """Opens `path` for reading and decompresses it if it is compressed."""
    with path.open("rb") as file:
        begins = file.read(8)
    opener = next((opener for magic, opener in _OPENERS.items() if begins.startswith(magic)), None)
    raw = path.open("rb", buffering=0) if opener is None else opener(path)
    return io.BufferedReader(raw, HEAD_BYTES)


_CONTAINERS = {
    b"PK\x03\x04": "a zip archive (or a document of an office program, or an e-book); unpack or convert it",
    b"%PDF": "a PDF; convert it to text",
    b"PAR1": "Parquet; set text=parquet",
    b"ARROW1": "an Arrow file; a folder written by save_to_disk is read by text=huggingface",
    b"WARC/": "a web archive; extract its text",
    b"\xff\xfe": "UTF-16; convert it: iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f utf-16 -t utf-8",
}


def check_text(head: bytes, name: str) -> None:
    """UserError if a file that begins with `head` is not UTF-8 text."""
    found = next((what for magic, what in _CONTAINERS.items() if head.startswith(magic)), None)
    if found is None and head[257:262] == b"ustar":
        found = "a tar archive; unpack it"
    if found is None and len(_NO_CHARACTER.findall(head.decode("utf-8", "surrogateescape"))) > NOT_TEXT * len(head):
        found = "no UTF-8 text (most of its first bytes are no characters); convert it, or take it out"
    if found is not None:
        raise UserError(f"text file {name} is {found}")


def holds_json_lines(head: str) -> bool:
    """Whether a file that begins with `head` has a JSON object with a string on each line."""
    lines = [line for line in head.split("\n") if line and not line.isspace()][:2]
    if len(head) >= HEAD_BYTES // 4 and len(lines) == 1:  # the first line goes on
        return bool(re.match(r'\s*\{\s*"', lines[0]))
    try:
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return False
    return bool(records) and all(isinstance(r, dict) and any(isinstance(v, str) for v in r.values()) for r in records)


def first_bytes(path: Path, name: str) -> bytes:
    """The first `HEAD_BYTES` of the content of `path`, decompressed."""
    with _opened(path, name) as binary:
        return binary.peek(HEAD_BYTES)[:HEAD_BYTES]


def read_chunks(path: Path, name: str, counts: Counter[str]) -> Iterator[str]:
    """Yields the UTF-8 text of `path` in chunks; invalid bytes become U+FFFD, with one warning that counts them.

    A file with such bytes counts as one `undecodable` document in `counts`.
    """
    broken = 0
    with _opened(path, name) as binary:
        check_text(binary.peek(HEAD_BYTES)[:HEAD_BYTES], name)
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
    with _opened(path, name) as binary:
        check_text(binary.peek(HEAD_BYTES)[:HEAD_BYTES], name)
        yield from enumerate(binary, start=1)


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[io.BufferedReader]:
    with read_errors(name), open_bytes(path) as binary:
        yield binary


@contextlib.contextmanager
def read_errors(name: str) -> Iterator[None]:
    """Turns errors while a file is read (a truncated archive, a missing permission) into a UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"text file {name} cannot be read ({error}); repair it or take it out") from None
