"""Towards Monosemanticity repeated: its parts against sums by hand, and all of it on made-up text."""

import base64
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper_2023 import corpus, language_model, proxies
from benchmarks.paper_2023.measure import NONE, Products
from sae_dist.config import UserError
from tests.papers.repeated import twice


def test_a_string_of_equally_likely_letters_is_as_likely_as_their_product_and_white_space_says_nothing():
    words = [b"", b"ac", b" g\n", b"\n\n", b"at!"]
    log_p = np.log([0.2, 0.1, 0.3, 0.3, 0.1])
    found = proxies.of_alphabet("acgt", words, log_p)
    expected = [0, 2 * math.log(1 / 4) - math.log(0.1), math.log(1 / 4) - math.log(0.3), 0]
    np.testing.assert_allclose(found[:4], expected)
    assert found[4] == pytest.approx(2 * math.log(1 / 4) + math.log(1e-10) - math.log(0.1))


def test_the_ratio_of_a_script_is_by_bayes_rule_also_of_tokens_that_are_parts_of_letters():
    first, second = "ש".encode()
    words = [b"", bytes([first]), bytes([second]), b"a", b" ", "é".encode()[:1], "é".encode()[1:]]
    document = np.array([3, 4, 1, 2, 1, 2, 3, 5, 6])  # "a שׁש a é" in bytes: 4 of Hebrew, 2 of a, 2 of é, white space
    found = proxies.of_scripts([document], words)
    assert list(found) == ["hebrew"]
    own = math.log(1) - math.log(4 / 8)
    never = math.log(1e-10) - math.log(4 / 8)
    np.testing.assert_allclose(found["hebrew"], [0, own, own, never, 0, never, never])


def test_evidence_is_the_largest_sum_that_ends_at_a_token_and_begins_with_its_document():
    ratio = np.array([0.0, 2.0, -1.0, -5.0])
    tokens = np.array([[1, 2, 1, 3, 1], [1, 1, 0, 1, 2]])
    begins = np.array([[True, False, False, False, False], [False, False, False, True, False]])
    found = proxies.evidence(ratio, tokens, begins)
    np.testing.assert_array_equal(found, [[2, 1, 3, 0, 2], [2, 4, 4, 2, 1]])


def test_categories_are_told_by_how_often_their_documents_have_a_token():
    documents = [("x", np.array([0, 0, 1])), ("y", np.array([1, 1]))]
    found = proxies.of_categories(documents, ["x"], 2)["x"]
    expected = [math.log(2.1 / 3.2) - math.log(2.1 / 5.2), math.log(1.1 / 3.2) - math.log(3.1 / 5.2)]
    np.testing.assert_allclose(found, expected)


def test_r_from_active_places_is_that_of_all_rows():
    chance = torch.Generator().manual_seed(0)
    f = torch.rand(200, 5, generator=chance, dtype=torch.float64).sub(0.7).clamp(min=0)
    p = torch.rand(200, 3, generator=chance, dtype=torch.float64)
    f[:, 4] = 0
    sums = Products(5, 3)
    for some in (slice(0, 77), slice(77, 200)):
        row, unit = f[some].nonzero(as_tuple=True)
        sums.add(p[some], unit, row, f[some][row, unit])
    expected = torch.corrcoef(torch.cat([f, p], 1).t())[:5, 5:]
    torch.testing.assert_close(sums.r()[:4], expected[:4])
    assert (sums.r()[4] == NONE).all()


def test_the_loss_in_pieces_and_its_gradients_are_torchs():
    chance = torch.Generator().manual_seed(0)
    hidden, W = (torch.randn(n, 6, generator=chance, dtype=torch.float64) for n in (1_100, 9))
    targets = torch.randint(0, 9, (1_100,), generator=chance)
    found = []
    for loss in (
        language_model.CrossEntropy.apply,
        lambda h, W, t: torch.nn.functional.cross_entropy(h @ W.t(), t),
    ):
        own = hidden.clone().requires_grad_(), W.clone().requires_grad_()
        value = 3 * loss(*own, targets)
        value.backward()
        found.append((value.detach(), own[0].grad, own[1].grad))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_transformer_whose_training_was_stopped_ends_in_the_same_weights(tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 50, 20_000).astype(np.int32)
    text, vocab, of = language_model.Corpus(tokens, tokens[:2_000]), 50, 4 * language_model.BATCH * 128
    whole = language_model.train(text, vocab, of, 0, tmp_path / "whole")
    monkeypatch.setattr(language_model, "SAVE_S", 0.0)
    save = language_model.save

    def stop_after_two(path, kept):
        save(path, kept)
        if kept["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(language_model, "save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        language_model.train(text, vocab, of, 0, tmp_path / "stopped")
    assert language_model.train(text, vocab, of, 0, tmp_path / "stopped") == whole
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert one == other
    assert not (tmp_path / "stopped/half.pt").exists()


def test_packages_become_documents_by_their_kind(tmp_path):
    (tmp_path / "a.dat").write_text("ID   X; 100 BP.\n     ccggnaagct cancttggac caccgactct cgantgnntc gccg   44\n//\n")
    (tmp_path / "a.html").write_text("<html><head>x</head><p>Two  &amp;\n words</p><!-- no --></html>")
    (tmp_path / "md5sums").write_text("0123ab  usr/bin/x\n4567cd  usr/bin/y\n")
    (tmp_path / "a.png").write_bytes(bytes(100))
    assert list(corpus.bases(tmp_path / "a.dat")) == ["     ccggnaagct cancttggac caccgactct cgantgnntc gccg   44"]
    assert "".join(corpus.prose(tmp_path / "a.html")).split() == ["Two", "&", "words"]
    assert list(corpus.digests(tmp_path / "md5sums")) == ["0123ab\n4567cd"]
    assert base64.b64decode("".join(corpus.encoded(tmp_path / "a.png"))) == bytes(100)
    source = corpus.Source("hex", "a", "md5*", corpus.digests, 1.0)
    assert list(corpus.read(source, tmp_path)) == [{"text": "0123ab\n4567cd", "category": "hex"}]
    with pytest.raises(UserError, match=r"a has no \*\.nothing"):
        list(corpus.read(source._replace(files="*.nothing"), tmp_path))


def made_up(path: Path) -> None:
    """Documents of DNA, base64, Hebrew and English, which have nothing but their letters."""
    chance = random.Random(0)
    hebrew = [chr(0x5D0 + at) for at in range(27)]
    kinds = {
        "dna": lambda: "".join(chance.choices("acgt", k=60)),
        "base64": lambda: base64.b64encode(chance.randbytes(57)).decode(),
        "he": lambda: " ".join("".join(chance.choices(hebrew, k=chance.randint(2, 7))) for _ in range(10)),
        "english": lambda: " ".join(
            chance.choices(["the", "of", "a", "man", "dog", "in", "house", "is", "and", "red", "went", "old"], k=12)
        ),
    }
    documents = [
        {"text": "\n".join(line() for _ in range(25)), "category": name}
        for _ in range(60)
        for name, line in kinds.items()
    ]
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents))


@pytest.mark.slow
def test_the_whole_paper_on_made_up_text(tmp_path):
    """Kinds that differ in their letters alone have latents that tell them a little; repeated, it is the same page."""
    made_up(tmp_path / "text.jsonl")
    found, page = twice("paper_2023", tmp_path / "out", "--text", str(tmp_path / "text.jsonl"))
    features = {line["proxy"]: line for line in found["features"]}
    for name in ("dna", "hebrew"):
        assert features[name]["modern A"][1] >= 0.1, features[name]
        assert features[name]["modern B"][1] >= 0.1, features[name]
    assert {(each["transformer"], each["recipe"], each["width"]) for each in found["dictionaries"]} == {
        *(("A", recipe, width) for recipe in ("paper", "modern") for width in (128, 256)),
        *((name, recipe, 256) for recipe in ("paper", "modern") for name in ("B", "shuffled")),
    }
    assert "hebrew" in page and "0.55" in page
