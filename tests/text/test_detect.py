"""What `text=PATH` becomes, on files that lie there: read right, or refused by name."""

import bz2
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_dist.cli.compose import compose
from sae_dist.config import UserError, load
from sae_dist.text.corpus import TextConfig, documents
from sae_dist.text.detect import DetectedText, detect
from sae_dist.text.jsonl import JsonlText

LINES = "".join(json.dumps({"text": f"words {i}", "url": f"https://example.org/{i}"}) + "\n" for i in range(5))
PROSE = "A sentence. " * 9


def text(path: Path) -> list[str]:
    """The documents of what the command line makes of `text=PATH`."""
    return sorted(document.text for document in documents(load(TextConfig, compose("run", [f"text={path}"])["text"])))


@pytest.mark.parametrize(
    "name", ["c.json.gz", "c.jsonl.bz2", "c.jsonl.zst", "c.JSONL.GZ", "c.ndjson", "c.json", "c.txt", "c", "c.data.xz"]
)
def test_json_lines_are_read_as_such_whatever_they_are_called(tmp_path, name):
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda b: pa.Codec("zstd").compress(b, asbytes=True)}
    (tmp_path / name).write_bytes(packed.get(Path(name).suffix.lower(), bytes)(LINES.encode()))
    assert detect(str(tmp_path / name)) == DetectedText("jsonl")
    assert [d.text for d in documents(JsonlText(path=str(tmp_path / name)))] == [f"words {i}" for i in range(5)]


@pytest.mark.parametrize("name", ["book", "book.tex", "book.txt.bz2"])
def test_plain_text_is_read_as_such(tmp_path, name):
    (tmp_path / name).write_bytes((bz2.compress if name.endswith("bz2") else bytes)(PROSE.encode()))
    assert detect(str(tmp_path / name)) == DetectedText("files")


def test_folders_are_what_is_in_them(tmp_path):
    def folder(**files: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_text(content)
        return str(path)

    settings = json.dumps({"hidden_size": 32, "name": "x"}, indent=1)
    assert detect(folder(a_jsonl=LINES, b_jsonl=LINES, info_json=settings)) == DetectedText("jsonl")
    assert detect(folder(a_json=LINES, b_json=LINES)) == DetectedText("jsonl", (".json",))
    assert detect(folder(a_txt=LINES, b_txt=LINES)) == DetectedText("jsonl", (".txt",))
    assert detect(folder(a_txt=PROSE, b_txt=LINES, config_json=settings, log=PROSE)) == DetectedText("files")
    assert detect(folder(config_json=settings)) == DetectedText("files")  # and then nothing is found in it
    assert text(Path(folder(a_json=LINES))) == [f"words {i}" for i in range(5)]
    with pytest.raises(
        UserError, match=r"several kinds \(1 \.md, 2 \.jsonl\); .* text=files text.path=.* or text=jsonl"
    ):
        detect(folder(a_jsonl=LINES, b_jsonl=LINES, README_md=PROSE))
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    assert detect(str(tmp_path / "saved")) == DetectedText("huggingface")


def test_parquet_is_known_by_its_name_and_by_its_bytes(tmp_path):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "rows")
    assert text(tmp_path / "rows") == ["one", "two"]
    os.link(tmp_path / "rows", tmp_path / "rows.parquet")
    assert detect(str(tmp_path / "rows.parquet")) == DetectedText("parquet")


def test_what_nobody_can_read_is_refused_before_anything_is_loaded(tmp_path):
    for name, content, said in (
        ("t.csv", b"id,text\n1,a\n", r"t\.csv ends in \.csv, which is not plain text; .* text=files text.path="),
        ("wiki.xml.bz2", bz2.compress(b"<page/>"), r"ends in \.xml"),
        ("b.pdf", b"%PDF-1.4 ...", r"text file b\.pdf is a PDF"),
        ("w.bin", bytes(range(256)) * 9, r"text file w\.bin is no UTF-8 text"),
        ("c.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 9, r"text file c\.jsonl\.zst cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            compose("run", [f"text={tmp_path / name}"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe' is neither a file nor a folder"):
        detect(str(tmp_path / "pipe"))
    with pytest.raises(UserError, match="is an address; text is read from local files"):
        detect("s3://bucket/corpus")


def test_what_is_not_there_is_judged_by_its_name():
    for path, kind in {
        "owner/name": "huggingface",
        "owner/name-1.0": "huggingface",
        "c4/en.json.gz": "jsonl",
        "a/b.jsonl.zst": "jsonl",
        "x.parquet": "parquet",
        "nowhere": "files",
        "words " * 400: "files",  # longer than any file's name
    }.items():
        assert detect(path) == DetectedText(kind)
