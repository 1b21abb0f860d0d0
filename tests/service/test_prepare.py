"""Tokens and store of a harvest that is begun, and begun again, with what may have happened between the two."""

import json
import os
import random
from pathlib import Path

import pytest

from sae_dist.config import UserError, load
from sae_dist.harvest.config import HarvestConfig
from sae_dist.model.config import ModelConfig
from sae_dist.service.prepare import Prepared, prepare
from sae_dist.text import chat, local_files
from sae_dist.text.jsonl import JsonlText

HARVEST = {"tokens": 512, "heldout_tokens": 256, "context": 32, "unit_sequences": 4}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words, generator = ["river", "stone", "cloud", "light", "under", "winter", "copper"], random.Random(0)
    lines = (" ".join(generator.choices(words, k=30)) for _ in range(80))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path / "text.jsonl"


def prepared(text: Path, **keys: str) -> Prepared:
    return prepare(
        model=ModelConfig(name="tiny-llama"), hook_points=["resid_post.0"], text=JsonlText(path=str(text), **keys),
        harvest=load(HarvestConfig, HARVEST), folder=text.parent / "out" / "text",
        store_uri=str(text.parent / "store"), progress=lambda _: None,
    )  # fmt: skip


def test_a_harvest_goes_on_with_the_tokens_that_it_began_with(text):
    first = prepared(text)
    file = first.split.train.folder / "tokens.npy"
    written = file.read_bytes()
    file.write_bytes(written[:200] + bytes([written[200] ^ 1]) + written[201:])
    again = prepared(text)
    assert file.read_bytes() == written
    assert again.meta.digest == first.meta.digest


def test_a_store_is_not_filled_up_from_another_text_of_the_same_fingerprint(text, monkeypatch):
    monkeypatch.setattr(local_files, "HASHED_BYTES", 0)  # a corpus so large that sizes and times must do
    prepared(text)
    stat = text.stat()
    text.write_text(text.read_text().replace("stone", "bread"))
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepared(text)  # the tokens of the old text are still there
    for file in (text.parent / "out" / "text").rglob("*.npy"):
        file.unlink()
    with pytest.raises(UserError, match=r"store=.* holds something else \(extra: .*token_streams"):
        prepared(text)


def test_a_store_of_conversations_says_which_tokens_are_rows(text, monkeypatch):
    said = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    turns = [[{"role": "user", "content": one[:9]}, {"role": "assistant", "content": one}] for one in said]
    text.write_text("".join(json.dumps({"talk": talk}) + "\n" for talk in turns))
    with pytest.raises(UserError, match="the model's tokenizer has no chat template"):
        prepared(text, messages="talk")
    template = text.parent / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    meta = prepared(text, messages="talk", template=str(template)).meta
    assert meta.extra["turns"] == "assistant" and meta.extra["chat_template"]
    with monkeypatch.context() as earlier, pytest.raises(UserError, match=r"store=.* holds something else \(extra"):
        earlier.setattr(chat, "FORMAT", 1)  # whose rows were others
        prepared(text, messages="talk", template=str(template))
    with pytest.raises(UserError, match="store=.* holds something else"):
        prepared(text, messages="talk", template=str(template), turns="all")
