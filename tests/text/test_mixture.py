"""Several texts in one: by weight, in an order that is the same each time."""

import json
from collections import Counter
from pathlib import Path

import pytest

from sae_dist.cli.compose import compose
from sae_dist.config import UserError, load
from sae_dist.text.corpus import TextConfig, documents, fingerprint
from sae_dist.text.document import Document
from sae_dist.text.mixture import MixtureText, interleaved
from sae_dist.text.tokenize import chat_template


def source(name: str, lengths: list[int]) -> list[Document]:
    return [Document(name * n, f"{name}{i}", name) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.2, 0.7]])
def test_each_source_has_its_share_of_the_characters_at_any_moment(weights):
    sources = [source("a", [7, 30, 2, 11] * 100), source("b", [20, 5] * 100)]
    taken: Counter[str] = Counter()
    for document in interleaved([iter(each) for each in sources], weights):
        taken[document.category or ""] += len(document.text)
        apart = taken["a"] / weights[0] - taken["b"] / weights[1]
        assert abs(apart) <= 30 / min(weights)  # one document at most


def test_it_ends_with_the_first_source_that_ends_and_keeps_their_order():
    found = list(interleaved([iter(source("a", [10] * 3)), iter(source("b", [10] * 50))], [1.0, 2.0]))
    assert [d.source for d in found if d.category == "a"] == ["a0", "a1", "a2"]
    others = [d.source for d in found if d.category == "b"]
    assert others == [f"b{i}" for i in range(len(others))] and 4 <= len(others) <= 7


@pytest.fixture
def files(tmp_path: Path) -> str:
    """The key that names two sources of different kinds."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)))
    (tmp_path / "b").mkdir()
    for i in range(9):
        (tmp_path / "b" / f"{i}.txt").write_text(f"file {i}")
    return f"text.sources=[{{kind: jsonl, path: {tmp_path / 'a.jsonl'}}}, {{kind: files, path: {tmp_path / 'b'}}}]"


def test_sources_of_any_kind_are_mixed_from_the_command_line(files):
    def config(*more: str) -> MixtureText:
        return load(TextConfig, compose("run", ["text=mixture", files, *more])["text"])

    found = [document.text.split()[0] for document in documents(config())]
    assert found[:6] == ["text", "file"] * 3
    heavy = [document.text.split()[0] for document in documents(config("text.weights=[2,1]"))]
    assert heavy[:6].count("text") == 4
    assert len({fingerprint(config()), fingerprint(config("text.weights=[2,1]"))}) == 2
    assert fingerprint(config()) == fingerprint(config())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["text.weights=[1,2,3]"], "weights=.* for 2 sources; give one for each"),
        (["text.weights=[1,0]"], "weights.1=0: give more than 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(files, keys, said):
    with pytest.raises(UserError, match=said):
        load(TextConfig, compose("run", ["text=mixture", files, *keys])["text"])


def test_a_mixture_of_nothing_and_conversations_read_in_two_ways_are_refused():
    with pytest.raises(UserError, match="text=mixture has no text.sources; give"):
        fingerprint(MixtureText())
    chats = [{"kind": "jsonl", "path": "a", "messages": "m", "turns": turns} for turns in ("all", "assistant")]
    with pytest.raises(UserError, match="differ in turns or template"):
        chat_template(load(TextConfig, {"kind": "mixture", "sources": chats}), tokenizer=None)  # type: ignore[arg-type]
