"""The labeller without a network: a rule about tokens and kinds of text, in words that its judge reads back.

It knows what a latent fires on as far as that can be said by the token itself, by the tokens right before it, and by
the category of the document. It knows no meanings. Its judge applies exactly what the label states.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from sae_dist.label.evidence import Evidence, Passage, Piece, joined
from sae_dist.label.interface import Item, Question

WORDS = 5  # in a clause, at most
LONGEST = 3  # tokens right before the token that are looked at together
REACH = 16  # tokens before it in which their text is looked for
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_LIST = rf"{_QUOTED}(?: or {_QUOTED})*"
_LABEL = re.compile(
    rf"(?:fires on (?P<on>{_LIST})|fires on any token)(?:, after (?P<after>{_LIST}))?(?:, in (?P<kinds>{_LIST}) text)?"
)


class Rule(NamedTuple):
    """A token fulfils it if it fulfils each clause that is not empty. Texts are in lower case."""

    on: tuple[str, ...] = ()  # the token, without spaces around
    after: tuple[str, ...] = ()  # how the text before it ends
    kinds: tuple[str, ...] = ()  # the category of the document

    @property
    def text(self) -> str:
        """As a label."""
        clauses = [f"fires on {_listed(self.on)}" if self.on else "fires on any token"]
        clauses += [f"after {_listed(self.after)}"] if self.after else []
        clauses += [f"in {_listed(self.kinds)} text"] if self.kinds else []
        return ", ".join(clauses)

    @classmethod
    def read(cls, label: str) -> "Rule | None":
        """The rule that a label states; None where it states none."""
        found = _LABEL.match(label)
        return None if found is None else cls(*(_unlisted(found[name]) for name in cls._fields))

    def holds(self, passage: Passage, at: int) -> bool:
        """Whether the token at that place fulfils it."""
        return (
            (not self.on or word(passage.pieces[at]) in self.on)
            and (not self.after or joined(passage.pieces[max(0, at - REACH) : at]).casefold().endswith(self.after))
            and (not self.kinds or passage.category in self.kinds)
        )


class Offline:
    """Labeller and judge."""

    identity = "offline, 1"  # the number changes with the labels that it gives

    def label(self, evidence: Sequence[Evidence]) -> Iterator[str]:
        for each in evidence:
            rule = best_rule(each.shown, each.others)
            promotes = f"; raises the logits of {_listed(each.promoted[:3])}" if each.promoted else ""
            yield rule.text + promotes if rule else ""

    def judge(self, questions: Sequence[Question]) -> Iterator[list[bool] | None]:
        for question in questions:
            rule = Rule.read(question.label)
            yield None if rule is None else [_most(rule, item) for item in question.items]


def best_rule(shown: Sequence[Passage], others: Sequence[Passage]) -> Rule | None:
    """The rule that tells the tokens of `shown` from those of `others` best; of equals, the one with fewest clauses."""
    on = _frequent(shown, lambda p: word(p.peak))
    after = [_frequent(shown, lambda p, n=n: _before(p, n)) for n in range(1, LONGEST + 1)]
    kinds = _frequent(shown, lambda p: p.category)
    choices = itertools.product(
        *(dict.fromkeys(each) for each in ([on, on[:1], ()], [*after, ()], [kinds, kinds[:1], ()]))
    )
    return max(
        (Rule(*clauses) for clauses in choices if any(clauses)), default=None,
        key=lambda rule: (_share(shown, rule) - _share(others, rule), -sum(map(bool, rule)), -sum(map(len, rule))),
    )  # fmt: skip


def word(piece: Piece) -> str:
    """A token without what differs between spellings of a word; bytes as <0xE2>."""
    if isinstance(piece, bytes):
        return "".join(f"<0x{byte:02X}>" for byte in piece)
    return piece.strip().casefold() or piece


def _frequent(passages: Sequence[Passage], said: Callable[[Passage], str | None]) -> tuple[str, ...]:
    """What is said of more than one document, or, where nothing is, of the strongest; the most active first."""
    weight: dict[str, float] = {}
    documents: dict[str, set[int]] = {}
    for passage in sorted(passages, key=lambda p: -p.value):
        if (own := said(passage)) is not None:
            weight[own] = weight.get(own, 0.0) + passage.value
            documents.setdefault(own, set()).add(passage.doc)
    order = sorted(weight, key=lambda own: -weight[own])
    return tuple([own for own in order if len(documents[own]) > 1][:WORDS] or order[:1])


def _before(passage: Passage, n: int) -> str | None:
    """The text of the `n` tokens right before the passage's own; None where there are fewer."""
    text = joined(passage.pieces[max(0, passage.at - n) : passage.at]).casefold()
    return (text.lstrip() or text) if n <= passage.at else None


def _share(passages: Sequence[Passage], rule: Rule) -> float:
    return sum(rule.holds(p, p.at) for p in passages) / len(passages) if passages else 0.0


def _most(rule: Rule, item: Item) -> bool:
    return 2 * sum(rule.holds(item.passage, at) for at in item.marked) > len(item.marked)


def _listed(words: Iterable[str]) -> str:
    return " or ".join(json.dumps(each, ensure_ascii=False) for each in words)


def _unlisted(text: str | None) -> tuple[str, ...]:
    return tuple(json.loads(each) for each in re.findall(_QUOTED, text or ""))
