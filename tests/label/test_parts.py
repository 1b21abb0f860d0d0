"""Rules that labels state, answers of models, and scores, against plain formulas."""

import json
import random
from statistics import fmean

import pytest
from scipy import stats

from sae_dist.label.evidence import Passage
from sae_dist.label.interface import Item
from sae_dist.label.offline import Rule, best_rule
from sae_dist.label.prompts import one_line, verdicts
from sae_dist.label.score import Trial, mean, score
from sae_dist.label.students_t import quantile


def passage(text: str, at: int = -1, *, category: str | None = None, doc: int = 0, value: float = 1.0) -> Passage:
    pieces = tuple(f" {word}" for word in text.split())
    at %= len(pieces)
    return Passage(pieces, at, (at,), value, -1, category, doc, at)


@pytest.mark.parametrize("odd", ['say "or" or "', "\\", "\n\t", ", in ", "⟦x⟧", "<0xE2>", "日本 語", "\u2028"])
def test_the_judge_reads_back_what_the_label_states(odd):
    for rule in (Rule(on=(odd, "b")), Rule(after=(odd,)), Rule(kinds=(odd, "c")), Rule((odd,), ("a", odd), ("k",))):
        assert Rule.read(rule.text) == rule == Rule.read(f'{rule.text}; raises the logits of "{odd[:1]}"')
        assert "\n" not in rule.text
    assert Rule.read("words about the sea") is None and Rule.read("") is None


def test_the_best_rule_is_the_one_that_tells_contexts_apart():
    law = [passage(f"x{i} in the court", category="law", doc=i) for i in range(6)]
    news = [passage(f"y{i} at no court", category="news", doc=i) for i in range(6)]
    assert best_rule(law, [passage("a cat", category="law")] * 6) == Rule(on=("court",))
    assert best_rule(law, [passage("at a court", category="law")] * 6) == Rule(after=("the",))
    assert best_rule(law, [passage("in the court", category="news")] * 6) == Rule(kinds=("law",))
    assert best_rule(law, news) in (Rule(after=("the",)), Rule(kinds=("law",)))
    mixed = [passage("in the court", category="news"), passage("a cat", category="law")] * 3
    assert best_rule(law, mixed) == Rule(on=("court",), kinds=("law",))
    assert best_rule([], []) is None


def test_bytes_and_spellings_of_a_word():
    one = Passage((" The", b"\xe2", " COURT"), 2, (2,), 1.0, -1, None, 0, 2)
    assert Rule(on=("court",)).holds(one, 2) and Rule(on=("<0xE2>",)).holds(one, 1) and Rule(on=("the",)).holds(one, 0)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0, 1]", [True, False, True]), ("Out of [1,2] I make\n[0,0,1].", [False, False, True]),
        ("[1, 0]", None), ("1, 0, 1", None), ("", None), ("<think>[1,1,1]</think> [0, 1, 0]", [False, True, False]),
    ],
)  # fmt: skip
def test_verdicts_are_the_last_list_of_as_many_numbers(answer, found):
    assert verdicts(answer, 3) == found


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('"the word of"', "the word of"), ("\n Label: dates\nmore", "dates"),
        ("<think>\nhm\n</think>\n\nships", "ships"),
        ("a\tb\x00c", "a b c"), ("x" * 900, "x" * 200), ("", ""),
    ],
)  # fmt: skip
def test_a_label_is_one_short_line(answer, label):
    assert one_line(answer) == label


def trial(truth: list[bool]) -> Trial:
    return Trial([Item(passage("a"), (0,))] * len(truth), truth)


def test_a_score_is_balanced_accuracy_and_its_interval_covers_the_truth():
    assert score(trial([True] * 9 + [False]), [True] * 10)[0] == 0.5
    assert score(trial([True, True, False, False]), [True, False, False, False])[0] == 0.75
    assert score(trial([True, False]), [False, True])[:2] == (0.0, 0.0)
    g, inside = random.Random(0), 0
    for _ in range(400):
        truth = [True] * 10 + [False] * 10
        found = score(trial(truth), [g.random() < (0.9 if each else 0.3) for each in truth])
        inside += found.low <= 0.8 <= found.high
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert inside > 0.92 * 400


@pytest.mark.parametrize("freedom", [*range(1, 12), 49, 50, 199, 200, 201, 202, 1000, 10**7])
def test_the_quantile_of_students_t_is_scipys(freedom):
    assert quantile(freedom) == pytest.approx(stats.t.isf(0.025, freedom), rel=1e-6)


def test_the_interval_of_a_mean():
    values = [random.Random(i).random() for i in range(50)]
    found = mean(values)
    assert found.value == fmean(values) and found.latents == 50 and found.low < found.value < found.high
    spread = (sum((x - found.value) ** 2 for x in values) / 49 / 50) ** 0.5
    assert found.high - found.value == pytest.approx(stats.t.isf(0.025, 49) * spread)
    assert mean([0.5]) == (0.5, None, None, 1) and mean([]) == (None, None, None, 0)
    json.dumps(found._asdict(), allow_nan=False)
