"""The built-in corpus's other kinds of text: programs, markup, data, base64, hexadecimal digests.

Readers as in `builtin_prose`; of a piece, also the `Document.parent_key` of its file.
"""

import base64
import json
import re
from collections.abc import Iterator, Sequence

import xxhash

from sae_dist.text import installed
from sae_dist.text.document import pieces, split_key

PIECE_CHARS = 6000
ROWS = 60  # digests in a document


def code(distributions: Sequence[str], suffixes: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
    """A tenth of each file's pieces, at least one, from anywhere in it: files begin with licences and imports."""
    for file in installed.files(distributions, suffixes):
        text = file.text()
        parts, whole = list(pieces([text], PIECE_CHARS)), split_key(text)
        for i in range(xxhash.xxh3_64_intdigest(file.name.encode(), 1) % min(10, max(1, len(parts))), len(parts), 10):
            yield f"{file.name}[{i}]", parts[i], whole


def javascript() -> Iterator[tuple[str, str]]:
    """Original sources from the source maps of bundled scripts."""
    for file in installed.files(["ray", "pyright"], (".js.map",)):
        sources = json.loads(file.text())
        named = zip(sources["sources"], sources.get("sourcesContent") or [], strict=False)
        for i, (name, text) in enumerate(named):
            if text and i % 5 == 0:
                yield f"{file.name}:{name}", text[:PIECE_CHARS]


def base64_text() -> Iterator[tuple[str, str]]:
    """Certificates in PEM, then the digests of installed files as wheels record them."""
    for file in installed.files(["certifi"], ("cacert.pem",)):
        certificates = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", file.text(), re.DOTALL)
        for i in range(0, len(certificates), 3):
            yield f"{file.name}:{i}", "\n".join(certificates[i : i + 3])
    yield from _recorded(["sympy", "networkx"], hexadecimal=False)


def hex_text() -> Iterator[tuple[str, str]]:
    """The digests of installed files as `sha256sum` prints them."""
    yield from _recorded(["transformers", "pandas", "numpy"], hexadecimal=True)


def _recorded(distributions: Sequence[str], *, hexadecimal: bool) -> Iterator[tuple[str, str]]:
    for distribution in distributions:
        rows = re.findall(r"^(.*),sha256=([\w-]{43}),\d*$", installed.metadata(distribution, "RECORD"), re.MULTILINE)
        rows = [row for row in rows if not row[0].startswith("..")]
        for i in range(0, len(rows), ROWS):
            lines = (
                f"{base64.urlsafe_b64decode(digest + '=').hex()}  {name}" if hexadecimal else f"{digest}  {name}"
                for name, digest in rows[i : i + ROWS]
            )
            yield f"{distribution}/RECORD:{i}", "\n".join(lines)
