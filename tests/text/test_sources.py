"""Files, JSON lines and Parquet, against documents that were written by hand."""

import gzip
import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_dist.config import CONF_DIR, UserError, load, to_dict
from sae_dist.text import files, jsonl, local_files, reading
from sae_dist.text.builtin import BuiltinText
from sae_dist.text.corpus import Document, TextConfig, documents, fingerprint
from sae_dist.text.files import FilesText
from sae_dist.text.huggingface import HuggingfaceText
from sae_dist.text.jsonl import JsonlText
from sae_dist.text.mixture import MixtureText
from sae_dist.text.parquet import ParquetText

KINDS = {c().kind: c for c in (BuiltinText, FilesText, JsonlText, ParquetText, HuggingfaceText, MixtureText)}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    (folder / "b" / ".git").mkdir(parents=True)
    (folder / "b" / "two.txt").write_text("zwei")
    (folder / "a.md").write_text("eins")
    (folder / "c.txt.gz").write_bytes(gzip.compress("drei €".encode()))
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "b" / ".git" / "hidden.txt").write_text("secret")
    (folder / ".hidden.txt").write_text("secret")
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_yaml_spells_out_the_defaults_of_its_dataclass(kind):
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "text" / f"{kind}.yaml"))
    assert values == to_dict(KINDS[kind]())
    assert load(TextConfig, values) == KINDS[kind]()


def test_a_folder_is_read_by_name_without_hidden_files_and_other_suffixes(library):
    assert list(documents(FilesText(path=str(library), category="folder"))) == [
        Document("eins", "library/a.md", "library"),
        Document("zwei", "library/b/two.txt", "b"),
        Document("drei €", "library/c.txt.gz", "library"),
    ]
    assert [d.category for d in documents(FilesText(path=str(library), category="suffix"))] == ["md", "txt", "txt"]


def test_a_single_file_is_read_whatever_its_suffix(library):
    (library / "notes").write_text("one note")
    assert list(documents(FilesText(path=str(library / "notes")))) == [Document("one note", "notes", None)]


def test_undecodable_bytes_are_replaced_one_by_one_and_counted_by_file(tmp_path, caplog):
    (tmp_path / "x.txt").write_bytes("a\ufffdé".encode() + b"\xff\xc3(" + "€".encode()[:2])
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in documents(FilesText(path=str(tmp_path / "x.txt")))] == [
            "a\ufffdé\ufffd\ufffd(\ufffd\ufffd"
        ]
    assert "x.txt: 4 bytes are not UTF-8" in caplog.text


def test_a_character_is_never_torn_between_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_CHARS", 1)
    text = "é€😀\r\nx" * 3
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte-order mark is not text
    assert [d.text for d in documents(FilesText(path=str(tmp_path / "x.txt")))] == [text.replace("\r\n", "\n")]


def test_an_enormous_file_streams_in_documents_of_a_million_characters(tmp_path):
    with (tmp_path / "big.txt").open("w") as file:
        for i in range(300_000):
            file.write(f"{i:09d}\n")
    stream = documents(FilesText(path=str(tmp_path / "big.txt")))
    assert next(stream).text[:20] == "000000000\n000000001\n"
    found = [len("x" * 1_000_000), *(len(d.text) for d in stream)]
    assert found == [1_000_000] * 3


def test_a_separator_makes_many_documents_of_a_file(tmp_path):
    (tmp_path / "x.txt").write_text("one\n\ntwo\nlines\n\n\n\nfour")
    texts = {"x.txt#0": "one", "x.txt#1": "two\nlines", "x.txt#3": "four"}
    for separator in ("\n\n", "\\n\\n"):  # YAML's and the command line's way to spell it
        config = FilesText(path=str(tmp_path / "x.txt"), separator=separator)
        assert {d.source: d.text for d in documents(config)} == texts
    assert fingerprint(config) != fingerprint(FilesText(path=config.path))


def test_json_lines_are_no_plain_text_unless_that_is_said(tmp_path, caplog):
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'{"text": "a", "url": "b"}\n' * 3))
    config = FilesText(path=str(tmp_path / "c.json.gz"))
    with pytest.raises(UserError, match=r"c\.json\.gz holds JSON lines; set text=jsonl .* text.suffixes=\[\.json\]"):
        list(documents(config))
    assert len(list(documents(FilesText(path=config.path, suffixes=(".json",))))) == 1
    assert "c.json.gz looks like JSON lines" in caplog.text


def test_the_folders_of_runs_and_stores_are_no_text(library):
    before = fingerprint(FilesText(path=str(library)))
    for marks in (["config.yaml", "status.json"], ["store.json"]):
        folder = library / "runs" / marks[0]
        (folder / "wandb").mkdir(parents=True)
        (folder / "wandb" / "requirements.txt").write_text("torch")
        for mark in marks:
            (folder / mark).write_text("{}")
    assert fingerprint(FilesText(path=str(library))) == before


def test_bad_files_are_counted_by_what_became_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_CHARS", 10)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("abcd efgh\nijkl mnop")
    (tmp_path / "torn.txt").write_bytes(b"fine \xff")
    (tmp_path / "good.txt").write_text("good")
    counts = Counter()
    texts = [d.text for d in documents(FilesText(path=str(tmp_path)), counts=counts)]
    assert texts == ["good", "abcd efgh\n", "ijkl mnop", "fine \ufffd"]
    assert +counts == {"empty": 2, "cut": 1, "undecodable": 1}


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet"])
def test_a_missing_path_is_said(kind):
    for path in ("nowhere/at/all.x", ""):
        with pytest.raises(UserError, match=f"text.path='{path}' does not exist"):
            next(documents(KINDS[kind](path=path)))  # pyright: ignore[reportCallIssue]
        with pytest.raises(UserError, match="does not exist"):
            fingerprint(KINDS[kind](path=path))  # pyright: ignore[reportCallIssue]


def test_a_folder_without_text_is_said(tmp_path):
    with pytest.raises(UserError, match=r"has no file that ends in \.txt, \.md, \.rst"):
        next(documents(FilesText(path=str(tmp_path))))
    for name in ("a.pdf", "b.pdf.gz", "LICENSE"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"it has 2 \.pdf, 1 LICENSE; set text\.suffixes.* text=jsonl"):
        next(documents(FilesText(path=str(tmp_path))))


def test_a_damaged_archive_is_said_by_name(library):
    whole = gzip.compress("".join(map(str, range(20_000))).encode())
    (library / "c.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"library/c\.txt\.gz cannot be read"):
        list(documents(FilesText(path=str(library))))


def test_a_fingerprint_follows_the_text_and_not_the_folder(library, tmp_path):
    config = FilesText(path=str(library))
    before = fingerprint(config)
    moved = tmp_path / "elsewhere" / "library"
    shutil.copytree(library, moved)
    assert fingerprint(FilesText(path=str(moved))) == before
    assert fingerprint(FilesText(path=str(library), category="folder")) != before
    (library / "a.md").write_text("einz")  # same size
    assert fingerprint(config) != before


def test_a_huge_corpus_is_known_by_sizes_and_times(library, monkeypatch):
    monkeypatch.setattr(local_files, "HASHED_BYTES", 3)
    before = fingerprint(FilesText(path=str(library)))
    assert fingerprint(FilesText(path=str(library))) == before
    (library / "a.md").write_text("eins!")
    assert fingerprint(FilesText(path=str(library))) != before


def test_json_lines_are_documents_with_their_line_numbers(tmp_path):
    lines = ['{"body": "one", "lang": "en"}', "", '{"body": null}', '{"body": "zwei", "lang": 2}', '{"body": " "}']
    (tmp_path / "w.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    config = JsonlText(path=str(tmp_path), field="body", category="lang")
    name = f"{tmp_path.name}/w.jsonl.gz"
    assert list(documents(config)) == [Document("one", f"{name}:1", "en"), Document("zwei", f"{name}:4", "2")]


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "a"', r"w\.jsonl:2 is not JSON"),
        (b'["a"]', r"w\.jsonl:2 holds a list"),
        (b'{"body": "a", "id": 1}', r"w\.jsonl:2 has no text in field 'text'; its fields: body, id"),
        (b'{"text": 3}', r"w\.jsonl:2 has no text in field 'text'"),
        (b'{"text": ' + b"[" * 100_000, r"w\.jsonl:2 cannot be read as JSON"),
        (b'{"text": ' + b"7" * 10_000 + b"}", r"w\.jsonl:2 cannot be read as JSON"),
    ],
)
def test_a_bad_line_is_said_by_number(tmp_path, line, said):
    (tmp_path / "w.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=said):
        list(documents(JsonlText(path=str(tmp_path / "w.jsonl"))))


def test_a_label_that_no_record_has_is_said_and_one_that_some_lack_is_none(tmp_path, monkeypatch):
    path = tmp_path / "w.jsonl"
    config = JsonlText(path=str(path), category="lang")
    path.write_text('{"text": "a"}\n\n{"text": "b", "language": "en"}\n')
    said = r"none of the first 2 records of w\.jsonl has the field 'lang'; their fields: text, language; set text\.cat"
    with pytest.raises(UserError, match=said):
        list(documents(config))
    path.write_text('{"text": "a"}\n{"text": "b", "lang": null}\n{"text": "c", "lang": "en"}\n{"text": "d"}\n')
    assert [d.category for d in documents(config)] == [None, None, "en", None]
    monkeypatch.setattr(jsonl, "LABELLED_WITHIN", 1)
    with pytest.raises(UserError, match="none of the first 1 records"):
        list(documents(config))
    path.write_text("")
    assert list(documents(config)) == []


def test_a_json_array_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "w.json").write_bytes(b'\xef\xbb\xbf\n[{"text": "a"},\n{"text": "b"}]')
    with pytest.raises(UserError, match=r"w\.json is a JSON array; make it an object a line: jq"):
        list(documents(JsonlText(path=str(tmp_path / "w.json"))))


def test_broken_bytes_and_surrogates_in_json_become_replacement_characters(tmp_path, caplog):
    (tmp_path / "w.jsonl").write_bytes(b'{"text": "a\xffb"}\n{"text": "\\ud83d\\ude00 \\ud800"}\n')
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in documents(JsonlText(path=str(tmp_path / "w.jsonl")))] == ["a\ufffdb", "😀 \ufffd"]
    assert "w.jsonl:1: 1" in caplog.text and "w.jsonl:2: 1" in caplog.text


def test_parquet_rows_are_documents_across_row_groups(tmp_path):
    table = pa.table({"content": ["a", None, "c", "d", "e"], "n": [1, 2, 3, None, 5], "other": [0.0] * 5})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    config = ParquetText(path=str(tmp_path / "p.parquet"), column="content", category="n")
    assert [d.category for d in documents(ParquetText(path=config.path, column="content", category="content"))][
        0
    ] == "a"
    assert list(documents(config)) == [
        Document("a", "p.parquet:0", "1"),
        Document("c", "p.parquet:2", "3"),
        Document("d", "p.parquet:3", None),
        Document("e", "p.parquet:4", "5"),
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_text_may_lie_in_parquet_in_any_of_arrows_ways(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(kind)}), tmp_path / "p.parquet")
    assert [d.text for d in documents(ParquetText(path=str(tmp_path / "p.parquet")))] == ["a", "b"]


def test_a_wrong_column_and_a_wrong_file_are_said(tmp_path):
    pq.write_table(pa.table({"text": [1], "words": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no column 'body'; it has text, words"):
        list(documents(ParquetText(path=str(tmp_path / "p.parquet"), column="body")))
    with pytest.raises(UserError, match=r"no column 'talk'; it has text, words; set text\.messages="):
        list(documents(ParquetText(path=str(tmp_path / "p.parquet"), messages="talk")))
    with pytest.raises(UserError, match=r"no column 'lang'; it has text, words; set text\.category="):
        list(documents(ParquetText(path=str(tmp_path / "p.parquet"), column="words", category="lang")))
    with pytest.raises(UserError, match="column 'text' holds int64, not text"):
        list(documents(ParquetText(path=str(tmp_path / "p.parquet"))))
    pq.write_table(pa.table({"text": ["word " * 500] * 50}), tmp_path / "torn.parquet", use_dictionary=False)
    whole = bytearray((tmp_path / "torn.parquet").read_bytes())
    whole[4:60] = b"\xff" * 56  # the header of its first page
    (tmp_path / "torn.parquet").write_bytes(whole)
    with pytest.raises(UserError, match=r"torn\.parquet is damaged \(.*\); replace it"):
        list(documents(ParquetText(path=str(tmp_path / "torn.parquet"))))
    (tmp_path / "q.parquet").write_bytes(json.dumps({}).encode() * 20)
    with pytest.raises(UserError, match=r"q\.parquet is not Parquet"):
        list(documents(ParquetText(path=str(tmp_path / "q.parquet"))))


def test_bytes_of_parquet_that_are_no_text_are_said_with_their_row(tmp_path):
    data, ends = b"onetwocaf\xe9four", pa.array([0, 3, 6, 10, 14], pa.int32())
    torn = pa.StringArray.from_buffers(4, ends.buffers()[1], pa.py_buffer(data))
    for name, table in {"text": {"text": torn}, "kind": {"text": list("abcd"), "kind": torn}}.items():
        pq.write_table(pa.table(table), tmp_path / "p.parquet", row_group_size=1)
        config = ParquetText(path=str(tmp_path / "p.parquet"), category="kind" if "kind" in table else "")
        with pytest.raises(
            UserError, match=rf"p\.parquet:2 has bytes in column '{name}' that are not UTF-8 \(.*\); write"
        ):
            list(documents(config))


def test_a_seed_shuffles_the_parts_and_changes_no_document(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"t{i}")
        (tmp_path / f"{i:02}.jsonl").write_text(f'{{"text": "j{i}"}}\n{{"text": "J{i}"}}\n')
    pq.write_table(pa.table({"text": [f"p{i}" for i in range(24)]}), tmp_path / "p.parquet", row_group_size=2)
    for kind in ("files", "jsonl", "parquet"):
        config = KINDS[kind](path=str(tmp_path))  # pyright: ignore[reportCallIssue]
        plain, seeded = list(documents(config)), list(documents(config, seed=1))
        assert plain != seeded and sorted(plain) == sorted(seeded) and len(plain) in (12, 24)
        assert seeded == list(documents(config, seed=1)) != list(documents(config, seed=2))
