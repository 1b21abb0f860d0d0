"""A tokenizer whose ids can be worked out by hand: the word "17" is token 17 + 2."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from sae_dist.text.jsonl import JsonlText


class Numbers:
    def __init__(self, *, bos: int | None = 1, eos: int | None = None):
        self.bos_token_id, self.eos_token_id = bos, eos
        self.encoded: list[str] = []

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number + 2 for number in range(1000)}

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        assert split_special_tokens and not add_special_tokens
        self.encoded += text
        return {"input_ids": [[int(word) + 2 if word.isdecimal() else 0 for word in t.split()] for t in text]}


@pytest.fixture(scope="session")
def numbers() -> Callable[..., Numbers]:
    return Numbers


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., JsonlText]:
    def write(texts: Iterable[str], name: str = "text.jsonl") -> JsonlText:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text, "kind": f"k{len(text) % 3}"}) + "\n" for text in texts))
        return JsonlText(path=str(path), category="kind")

    return write
