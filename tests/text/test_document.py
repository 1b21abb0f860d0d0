import itertools
import logging
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_dist.text import document
from sae_dist.text.document import Document, clean, cut, doc_id, pieces, separated, split_key


@given(st.lists(st.text("ab \n", max_size=40)), st.integers(1, 12))
def test_pieces_join_to_the_text_and_none_is_over_the_limit(chunks, limit):
    found = list(pieces(chunks, limit))
    assert "".join(found) == "".join(chunks)
    assert all(0 < len(piece) <= limit for piece in found)


def test_a_cut_prefers_empty_lines_to_line_breaks_to_spaces_to_nothing():
    assert list(pieces(["aaaa bb\ncc\n\nd eeee"], 13)) == ["aaaa bb\ncc\n\n", "d eeee"]
    assert list(pieces(["aaaa bb\ncc eeee"], 11)) == ["aaaa bb\n", "cc eeee"]
    assert list(pieces(["aaaa bb eeee"], 10)) == ["aaaa bb ", "eeee"]
    assert list(pieces(["abcdefgh"], 3)) == ["abc", "def", "gh"]


@given(st.lists(st.text("ab\n", max_size=9)), st.sampled_from(["", "\n", "\n\n", "ab", "aab"]))
def test_documents_are_told_apart_by_the_separator_wherever_chunks_end(chunks, separator):
    text = "".join(chunks)
    found = [(number, "".join(parts)) for number, parts in separated(chunks, separator)]
    assert found == list(enumerate(text.split(separator) if separator else [text]))


def test_a_document_without_end_is_divided_as_it_streams():
    endless = ("x" * 10 for _ in itertools.count())
    _, parts = next(separated(endless, "\n\n"))
    assert len(next(pieces(parts, 1000))) == 1000


COPIES = ["Line one\nline two", "line one line two\n", "\n\n Line one\r\n\tLINE  two \n", "Line\u00a0one ｌine two"]


def test_copies_have_one_name_and_one_side_key():
    assert len({doc_id(text) for text in COPIES}) == len({split_key(text) for text in COPIES}) == 1
    assert doc_id("café") == doc_id("cafe\u0301\n") and doc_id("1 2") != doc_id("12") != doc_id("13")


@given(st.lists(st.text("abß \n", max_size=30), max_size=20), st.integers(1, 40), st.text(" \n", max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_pieces_of_a_document_know_what_the_whole_would_be_known_by(monkeypatch, chunks, limit, more):
    monkeypatch.setattr(document, "SIDE_CHARS", 25)
    text = "".join(chunks)
    for copy in (chunks, [more, *chunks], [more + text]):
        found = list(cut(copy, limit))
        assert "".join(piece for piece, _ in found) == "".join(copy)
        wholes = {whole for _, whole in found}
        assert wholes <= ({None} if len(found) < 2 else {split_key(text)})


def test_pieces_read_no_further_than_they_must():
    read = []

    def chunks():
        for i in range(100):
            read.append(i)
            yield "x" * 10

    next(pieces(chunks(), 20))
    assert len(read) == 3


def test_blank_documents_vanish_and_long_ones_are_numbered(monkeypatch):
    monkeypatch.setattr(document, "MAX_CHARS", 4)
    counts: Counter[str] = Counter()
    assert list(clean(Document(" \n\t", "a", None), counts)) == []
    assert list(clean(Document("", "a", None), counts)) == []
    whole = split_key("ab cde")
    found = clean(Document("ab cde", "a", "c"), counts)
    assert list(found) == [Document("ab ", "a[0]", "c", whole), Document("cde", "a[1]", "c", whole)]
    assert counts == {"empty": 2, "cut": 1}


def test_lone_surrogates_are_replaced_and_counted_by_name(caplog):
    counts: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in clean(Document("a\ud800b\udcff", "web.jsonl:3", None), counts)] == ["a\ufffdb\ufffd"]
    assert counts == {"undecodable": 1}
    assert "web.jsonl:3: 2 undecodable characters" in caplog.text


def test_lone_surrogates_are_replaced_wherever_a_document_has_them(caplog):
    counts: Counter[str] = Counter()
    messages = [{"role": "user", "content": "hi \ud83d", "calls": [{"name": "\udcff"}, 3]}]
    given = Document("user: hi \ud83d", "caf\udce9.txt", "l\ud800w", messages=messages)
    with caplog.at_level(logging.WARNING):
        found = list(clean(given, counts))
    messages = [{"role": "user", "content": "hi \ufffd", "calls": [{"name": "\ufffd"}, 3]}]
    assert found == [Document("user: hi \ufffd", "caf\ufffd.txt", "l\ufffdw", messages=messages)]
    assert counts == {"undecodable": 1}
    assert "caf\ufffd.txt: 3 undecodable characters" in caplog.text
    assert [d.source for d in clean(Document("text", "caf\udce9.txt", None), counts)] == ["caf\ufffd.txt"]
    assert counts == {"undecodable": 1}  # the name of a file is not counted with each of its documents
