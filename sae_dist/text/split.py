"""The split into training and held-out documents, and the error when one side has too little text.

The side is a function of the document's text, so copies and pieces of a document are all on the same side, in any
order of the corpus.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from sae_dist.text.document import Document, doc_id, split_key
from sae_dist.text.stream_writer import StreamWriter

HELDOUT_SALT = 0x5AE0  # not the run's seed: what one run holds out, no other run trains on


class SplitDocument(NamedTuple):
    """A document with its id and the stream that it belongs to."""

    document: Document
    doc: int
    side: StreamWriter


@dataclasses.dataclass
class TextTally:
    """Counts of the text that was read and tokenised so far."""

    docs: set[int] = dataclasses.field(default_factory=set)
    cut: set[int] = dataclasses.field(default_factory=set)  # the wholes of pieces
    n_whole: int = 0  # documents that are in one piece
    n_chars: int = 0
    n_repeated: int = 0
    tokenised_chars: int = 0
    tokens: int = 0

    @property
    def n_documents(self) -> int:
        return self.n_whole + len(self.cut)


def is_heldout(whole: int, heldout_fraction: float) -> bool:
    """Whether the document with that `split_key` is held out; a larger fraction holds out a superset."""
    return xxhash.xxh3_64_intdigest(whole.to_bytes(8, "little"), HELDOUT_SALT) < heldout_fraction * 2**64


def split_documents(
    found: Iterable[Document], tally: TextTally, *, train: StreamWriter, heldout: StreamWriter, heldout_fraction: float
) -> Iterator[SplitDocument]:
    """Yields every new document whose side still needs tokens."""
    for document in found:
        if train.full and heldout.full:
            return
        tally.n_chars += len(document.text)
        doc = doc_id(document.text)
        if doc in tally.docs:
            tally.n_repeated += 1
            continue
        tally.docs.add(doc)
        if document.parent_key is None:
            tally.n_whole += 1
        else:
            tally.cut.add(document.parent_key)
        whole = split_key(document.text) if document.parent_key is None else document.parent_key
        side = heldout if is_heldout(whole, heldout_fraction) else train
        if not side.full:
            yield SplitDocument(document, doc, side)


def shortage(train: StreamWriter, heldout: StreamWriter, *, tally: TextTally, heldout_fraction: float) -> str:
    """The message when the text ends before both sides are full: too little text, or too few documents."""
    all_tokens = tally.tokens * tally.n_chars / max(tally.tokenised_chars, 1)
    if all_tokens >= train.wanted + heldout.wanted:
        return _too_few_documents(train, heldout, tally=tally)
    # a side that is full does not tell how much text there is; of two, the larger training side tells it better
    there = heldout.done / heldout_fraction if train.full else train.done / (1 - heldout_fraction)
    enough = int(0.9 * there) - heldout.wanted  # 0.9: shares are by documents, which are not equally long
    cure = f"ask for fewer (try harvest.tokens={enough}) or give more text" if enough > 0 else "give more text"
    return (
        f"the text is too short: {train.done:,} of {train.wanted:,} training tokens and {heldout.done:,} of "
        f"{heldout.wanted:,} held-out ones in {tally.n_documents:,} documents of {tally.n_chars:,} characters; {cure}"
    )


def _too_few_documents(train: StreamWriter, heldout: StreamWriter, *, tally: TextTally) -> str:
    short, what = (train, "to train on") if heldout.full else (heldout, "held out (harvest.heldout_tokens)")
    alone = tally.n_documents == 1
    why = (
        "its one document cannot be on both sides"
        if alone
        else f"each of its {tally.n_documents:,} documents is on one side as a whole, and too few are on that one"
    )
    return (
        f"the text has {tally.n_chars:,} characters, but gave {short.done:,} of {short.wanted:,} tokens {what}: {why}; "
        "give more and shorter documents, or say what stands between those of a plain text: 'text.separator=\"\\n\\n\"'"
        + ("" if alone else ", or change the share by harvest.heldout_tokens")
    )
