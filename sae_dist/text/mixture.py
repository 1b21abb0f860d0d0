"""Several texts mixed by weight: after any number of documents each has about its share of the characters."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.text import single
from sae_dist.text.document import Document
from sae_dist.text.single import SingleText


@frozen
class MixtureText:
    """The mixture ends where the first of its texts does, so that shares hold for all of it."""

    kind: Literal["mixture"] = "mixture"
    sources: tuple[SingleText, ...] = ()  # each with the keys of its kind: [{kind: jsonl, path: web.jsonl}, ...]
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of each source's characters; empty: equal shares

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"weights={list(self.weights)} for {len(self.sources)} sources; give one for each, or none at all"
            )


def documents(config: MixtureText, seed: int | None, counts: Counter[str]) -> Iterator[Document]:
    sources = [single.documents(source, seed, counts) for source in config.sources]
    return interleaved(sources, config.weights or [1.0] * len(sources))


def fingerprint(config: MixtureText) -> list[object]:
    return [config.kind, list(config.weights), [single.fingerprint(source) for source in config.sources]]


def interleaved(sources: Sequence[Iterator[Document]], weights: Sequence[float]) -> Iterator[Document]:
    """Takes the next document from the source that has the fewest characters for its weight, until one has no more."""
    taken = [0] * len(sources)
    while sources:
        behind = min(range(len(sources)), key=lambda number: taken[number] / weights[number])
        document = next(sources[behind], None)
        if document is None:
            return
        taken[behind] += len(document.text)
        yield document
