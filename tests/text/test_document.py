import logging
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sae_dist.text import document
from sae_dist.text.document import Document, clean, pieces


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
    cut = clean(Document("ab cde", "a", "c"), counts)
    assert list(cut) == [Document("ab ", "a[0]", "c"), Document("cde", "a[1]", "c")]
    assert counts == {"empty": 2, "cut": 1}


def test_lone_surrogates_are_replaced_and_counted_by_name(caplog):
    counts: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in clean(Document("a\ud800b\udcff", "web.jsonl:3", None), counts)] == ["a\ufffdb\ufffd"]
    assert counts == {"undecodable": 1}
    assert "web.jsonl:3: 2 undecodable characters" in caplog.text
