"""The built-in corpus: what it promises on any machine, and its readers against snippets worked by hand."""

import ast
import base64
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from sae_dist.config import UserError, load
from sae_dist.text import builtin_prose
from sae_dist.text.builtin import CATEGORIES, DOCUMENT_CHARS, BuiltinText
from sae_dist.text.corpus import TextConfig, documents, fingerprint

NEEDED = {"service_docs", "docstrings", "readme", "python_docs", "licence", "python", "c", "json", "base64", "hex"}


@pytest.fixture(scope="module")
def corpus():
    return list(documents(BuiltinText(scale=0.05)))


def test_it_is_the_same_each_time_and_no_origin_is_twice(corpus):
    assert list(documents(BuiltinText(scale=0.05))) == corpus
    assert len({d.source for d in corpus}) == len(corpus)


def test_documents_are_short_and_no_category_is_over_its_share(corpus):
    assert all(0 < len(d.text) <= DOCUMENT_CHARS for d in corpus)
    for category in {d.category for d in corpus}:
        assert sum(len(d.text) for d in corpus if d.category == category) <= CATEGORIES[category][0] * 1000 * 0.05


def test_what_our_own_dependencies_ship_is_there(corpus):
    assert NEEDED <= {d.category for d in corpus} <= set(CATEGORIES)


def test_origins_name_no_place_of_this_machine(corpus):
    assert not [d.source for d in corpus if d.source.startswith(("/", "..")) or "site-packages" in d.source]


def test_hex_lines_are_the_digests_of_the_files_that_they_name(corpus):
    lines = "\n".join(d.text for d in corpus if d.category == "hex").splitlines()
    found = [match.groups() for line in lines if (match := re.fullmatch(r"([0-9a-f]{64})  (\S+\.py)", line))]
    for digest, name in found[:5]:
        path = importlib.metadata.distribution(name.split("/")[0]).locate_file(name)
        assert hashlib.sha256(Path(str(path)).read_bytes()).hexdigest() == digest
    assert len(found) >= 5


def test_certificates_are_whole_base64(corpus):
    text = next(d.text for d in corpus if d.source.startswith("certifi") and "END CERT" in d.text)
    body = re.search(r"BEGIN CERTIFICATE-----(.*?)-----END", text, re.DOTALL)[1]
    assert base64.b64decode(body)[0] == 0x30  # ASN.1: a certificate is a sequence


def test_python_code_is_python(corpus):
    whole = [d.text for d in corpus if d.category == "python" and d.source.endswith("[0]") and len(d.text) < 2000]
    assert whole and all(ast.parse(text) for text in whole)


def test_chosen_categories_come_alone_and_unknown_ones_are_refused():
    config = load(TextConfig, {"kind": "builtin", "categories": ["hex", "python_docs"], "scale": 0.1})
    assert {d.category for d in documents(config)} == {"hex", "python_docs"}
    with pytest.raises(UserError, match=r"categories=\['dna'\] are not built in; choose from wikipedia, bible"):
        load(TextConfig, {"kind": "builtin", "categories": ["dna"]})
    with pytest.raises(UserError, match="scale=0.0 leaves no text"):
        load(TextConfig, {"kind": "builtin", "scale": 0.0})


def test_the_fingerprint_knows_the_choice(monkeypatch):
    assert fingerprint(BuiltinText()) == fingerprint(BuiltinText())
    assert len({fingerprint(BuiltinText(scale=s, categories=c)) for s in (1, 2) for c in ((), ("hex",))}) == 4


def test_an_article_is_left_with_its_prose():
    markup = (
        "{{Infobox|a={{nested|x}}}}'''Rome''' is a [[city]] in [[Italy|the country]].&lt;ref name=&quot;a&quot;&gt;no"
        "&lt;/ref&gt;&lt;ref name=b /&gt;\n[[File:r.jpg|thumb|A [[view]] of it]]\n{| class=t\n| cell\n|}\n"
        "== History ==\n* [http://x.org first] point&amp;nbsp;one\n<!-- note -->\n== See also ==\n* gone\n"
    )
    assert builtin_prose._plain_article(markup) == ("Rome is a city in the country.\n\nHistory\n- first point\xa0one")


def test_service_documentation_is_left_with_its_prose():
    markup = (
        "<p>Aborts  an <code>upload</code> &amp; more.</p> <note> <ul> <li> <p>One</p> </li> <li>Two</li></ul></note>"
    )
    assert builtin_prose._plain_html(markup) == "Aborts an upload & more.\n- One\n- Two"


def test_an_escape_in_a_quoted_passage_counts_once():
    for passage in ("plain", 'a "quote"', "back\\slash", "\\\\", "line\n", '\\"'):
        (quoted,) = builtin_prose._DOCUMENTATION.findall(json.dumps({"documentation": passage}).replace(": ", ":"))
        assert json.loads(quoted) == passage and builtin_prose._characters(quoted) == len(passage)


def test_only_long_docstrings_of_definitions_are_prose():
    long = "Explains a thing.\n    " + "word " * 50
    source = f'x = """{long}"""\ndef f():\n    """Short."""\n\ndef g(\n):\n    r"""{long}"""\n    return 1\n'
    assert [t for t in builtin_prose._DOCSTRING.findall(source) if len(t) >= 200] == [long]


def test_script_literals_are_unescaped():
    unescaped = re.sub(r"\\(x[0-9a-f]{2}|.)", builtin_prose._unescape, r"\xe9t\xe9 \'a\' \\n \\\"")
    assert unescaped == "été 'a' \\n \\\""


def test_an_absent_package_is_an_absent_category_and_a_corpus_of_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setitem(CATEGORIES, "bible", (100, lambda: iter(())))
    with caplog.at_level("INFO"):
        assert {d.category for d in documents(BuiltinText(categories=("bible", "hex"), scale=0.01))} == {"hex"}
    assert "built-in text without bible" in caplog.text
    with pytest.raises(UserError, match=r"categories=\['bible'\] need packages that are not installed"):
        list(documents(BuiltinText(categories=("bible",))))
