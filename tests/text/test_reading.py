"""Compressed files by what is in them, and files that are no text; every archive is one that a real tool makes."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections import Counter

import pyarrow as pa
import pytest

from sae_dist.config import UserError
from sae_dist.text.corpus import documents
from sae_dist.text.files import FilesText
from sae_dist.text.jsonl import JsonlText
from sae_dist.text.reading import holds_json_lines, read_chunks, read_lines


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


SKIPPED = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # pzstd writes such frames between the others
PACKED = {
    "x.txt": lambda data: data,
    "x.txt.gz": gzip.compress,
    "x.txt.bz2": bz2.compress,
    "x.txt.xz": lzma.compress,
    "x.txt.zst": zstd,
    "parts.gz": lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:]),
    "parts.zst": lambda data: SKIPPED + zstd(data[:7]) + SKIPPED + zstd(data[7:]) + SKIPPED,
    "unpacked-by-the-browser.gz": lambda data: data,
    "named-otherwise.txt": gzip.compress,
    "LOUD.TXT.BZ2": bz2.compress,
}
TEXT = "first line\nzwei €\n" * 9


@pytest.mark.parametrize("name", PACKED)
def test_compressed_text_is_read_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name](TEXT.encode()))
    assert "".join(read_chunks(tmp_path / name, name, Counter())) == TEXT
    assert [number for number, _ in read_lines(tmp_path / name, name)] == list(range(1, 19))


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.bz2", "x.txt.xz", "x.txt.zst"])
def test_an_archive_that_breaks_off_is_said_by_name(tmp_path, name):
    whole = PACKED[name]("".join(f"{i} {i * i}\n" for i in range(5_000)).encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name} cannot be read .*; repair it or take it out"):
        list(read_chunks(tmp_path / name, name, Counter()))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(member := tarfile.TarInfo("a.txt"), io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


NO_TEXT = {
    "a zip archive": zipped(),
    "a tar archive; unpack it": tarred(),
    "a PDF; convert it": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\n",
    "a web archive": gzip.compress(b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nplain words"),
    "UTF-16; convert it: iconv": TEXT.encode("utf-16"),
    "no UTF-8 text": TEXT.encode("utf-16-le"),
    "no UTF-8 text .*convert it": "Москва — столица России. ".encode("cp1251") * 9,
    "no UTF-8 text (": bytes(range(256)) * 40,
    "no UTF-8 text (most": gzip.compress(gzip.compress(TEXT.encode())),
}


@pytest.mark.parametrize("said", NO_TEXT)
def test_what_is_no_text_is_refused_by_name_and_kind(tmp_path, said):
    for name, config in (("x.txt", FilesText), ("x.jsonl", JsonlText)):
        (tmp_path / name).write_bytes(NO_TEXT[said])
        with pytest.raises(UserError, match=f"text file {name} is {said.replace('(', '[(]')}"):
            list(documents(config(path=str(tmp_path / name))))


def test_text_with_some_broken_bytes_is_still_text(tmp_path):
    (tmp_path / "x.txt").write_bytes("Ein schöner Tag für Übungen\n".encode("latin-1") * 9 + b"\0")
    assert len(list(documents(FilesText(path=str(tmp_path / "x.txt"))))) == 1


@pytest.mark.parametrize(
    "head, holds",
    [
        ('{"text": "a"}\n{"text": "b"}\n{"te', True),
        ('\n{"text": "a", "n": 1}', True),
        ('{"text": "' + "a" * 70_000, True),  # the first line goes on
        ('{"!": 0, "a": 1}', False),  # a vocabulary
        ('{\n  "text": "a"\n}\n', False),
        ('{"text": "a"}\nand then prose', False),
        ("[1]\n[2]\n", False),
        ("{" * 5000, False),
        ("prose", False),
        ("", False),
    ],
)
def test_json_lines_are_told_from_text_by_their_beginning(head, holds):
    assert holds_json_lines(head) is holds
