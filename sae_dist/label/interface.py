"""What a labeller and a judge are: a new one is a class with these methods and a line in `choose.py`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from sae_dist.label.evidence import Evidence, Passage

DETECTION, FUZZING = "detection", "fuzzing"


class Item(NamedTuple):
    """A passage with marked tokens. Detection: cut after its own token, which is marked."""

    passage: Passage
    marked: tuple[int, ...]  # places in its pieces


class Question(NamedTuple):
    """Of each item: does the latent fire on the marked tokens, if the label is right?"""

    kind: str  # DETECTION or FUZZING
    label: str
    items: Sequence[Item]


class Labeller(Protocol):
    """Gives labels."""

    def label(self, evidence: Sequence[Evidence]) -> Iterator[str]:
        """A label of one line for each latent, in order; empty where it found none."""
        ...


class Judge(Protocol):
    """Applies labels that it may not have given itself."""

    def judge(self, questions: Sequence[Question]) -> Iterator[list[bool] | None]:
        """An answer for each item of each question, in order; None where the answer could not be read."""
        ...
