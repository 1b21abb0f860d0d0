"""Hugging Face datasets that lie on this disk: saved ones and folders of data files."""

import json
from pathlib import Path

import datasets
import pytest

from sae_dist.config import UserError
from sae_dist.text.corpus import Document, documents, fingerprint
from sae_dist.text.huggingface import HuggingfaceText

ROWS = {"text": ["one", "", "three"], "lang": ["en", "en", "fr"]}
EXPECTED = [Document("one", "data/train:0", "en"), Document("three", "data/train:2", "fr")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))  # pyright: ignore[reportAttributeAccessIssue]
    datasets.disable_progress_bars()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = (dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_of_data_files_streams_or_loads_to_the_same_documents(data, streaming):
    assert list(documents(HuggingfaceText(path=str(data), category="lang", streaming=streaming))) == EXPECTED


@pytest.mark.parametrize("splits", [True, False])
def test_a_saved_dataset_is_read_with_and_without_splits(tmp_path, splits):
    saved = datasets.Dataset.from_dict(ROWS)
    (datasets.DatasetDict({"train": saved}) if splits else saved).save_to_disk(tmp_path / "data")
    config = HuggingfaceText(path=str(tmp_path / "data"), category="lang")
    assert list(documents(config)) == EXPECTED
    assert fingerprint(config) == fingerprint(config)


def test_the_fingerprint_changes_with_the_data_and_the_field(data):
    config = HuggingfaceText(path=str(data))
    before = fingerprint(config)
    assert fingerprint(config) == before
    assert fingerprint(HuggingfaceText(path=str(data), field="lang")) != before
    (data / "train.jsonl").write_text('{"text": "another", "lang": "en"}\n')
    assert fingerprint(config) != before


def test_a_wrong_split_field_or_folder_is_said(data, tmp_path):
    with pytest.raises(UserError, match=r"cannot be loaded: .*tset"):
        list(documents(HuggingfaceText(path=str(data), split="tset")))
    for streaming in (True, False):
        for key in ("field", "messages", "category"):
            with pytest.raises(UserError, match=rf"has no column 'body'; it has text, lang; set text\.{key}="):
                list(documents(HuggingfaceText(path=str(data), streaming=streaming, **{key: "body"})))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="text.split='test' is not in .*; it has train"):
        list(documents(HuggingfaceText(path=str(tmp_path / "saved"), split="test")))
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        list(documents(HuggingfaceText(path=str(tmp_path / "void"))))
    with pytest.raises(UserError, match="names no dataset"):
        list(documents(HuggingfaceText()))


def test_a_damaged_data_file_is_said(data):
    (data / "train.jsonl").write_text('{"text": "one"}\n{"text": \n')
    for streaming in (True, False):
        with pytest.raises(UserError, match="cannot be loaded"):
            list(documents(HuggingfaceText(path=str(data), streaming=streaming)))


def test_a_name_that_cannot_be_reached_is_said(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="nobody/nothing.* cannot be loaded"):
        list(documents(HuggingfaceText(path="nobody/nothing")))


def test_a_seed_shuffles_blocks_and_keeps_row_numbers(tmp_path):
    datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(1000)]}).save_to_disk(tmp_path / "data")
    found = list(documents(HuggingfaceText(path=str(tmp_path / "data")), seed=1))
    assert [d.source for d in found] == [f"data/train:{d.text[1:]}" for d in found]
    assert sorted(int(d.text[1:]) for d in found) == list(range(1000)) != [int(d.text[1:]) for d in found]
