"""A token stream: the documents of a corpus end to end, memory-mapped, cut into sequences of one context each.

A folder holds `tokens.npy` int32 [n_tokens], `starts.npy` int64 [n_documents + 1] and `documents.arrow`, a table of
(doc uint64, source, category); of conversations also `counted.npy` bool [n_tokens]. n_tokens is a multiple of the
context: sequence s is the tokens from s * context on.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Int32, Int64, UInt32, UInt64

from sae_dist.config import UserError


class Sequences(NamedTuple):
    tokens: Int64[np.ndarray, "m context"]
    doc: UInt64[np.ndarray, "m context"]
    pos: UInt32[np.ndarray, "m context"]  # position in the document; a sequence may hold the end of one and more
    counted: Bool[
        np.ndarray, "m context"
    ]  # whether it may become a row: all of a text, the chosen turns of a conversation
    conversations: bool = False  # of a stream that has some: `counted` says it of separators, too


class TokenWindow(NamedTuple):
    tokens: Int64[np.ndarray, " n"]
    at: int  # index among them of the token that was asked for


class TokenStream:
    """The folder of one stream that `tokenize` wrote. Pickled by its path; arrays are memory-mapped."""

    tokens: Int32[np.ndarray, " n_tokens"]
    starts: Int64[np.ndarray, " n_documents_1"]

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.context = int(json.loads((self.folder / "stream.json").read_text())["context"])
            self.tokens = np.load(self.folder / "tokens.npy", mmap_mode="r")
            self.starts = np.load(self.folder / "starts.npy", mmap_mode="r")
            counted = self.folder / "counted.npy"
            self._counted = np.load(counted, mmap_mode="r") if counted.exists() else None
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} is no token stream ({error.filename} is missing); tokenize again") from None

    def __reduce__(self) -> tuple[type["TokenStream"], tuple[Path]]:
        return TokenStream, (self.folder,)

    @functools.cached_property
    def documents(self) -> pa.Table:
        """(doc, source, category), a row a document, in the order of the stream."""
        with pa.memory_map(str(self.folder / "documents.arrow")) as source:
            return pa.ipc.open_file(source).read_all()

    @functools.cached_property
    def doc_ids(self) -> UInt64[np.ndarray, " n_documents"]:
        return self.documents["doc"].to_numpy()

    @functools.cached_property
    def _by_id(self) -> Int64[np.ndarray, " n_documents"]:
        return np.argsort(self.doc_ids)

    @property
    def has_conversations(self) -> bool:
        """Whether `Sequences.counted` leaves tokens out: those that open documents, and turns that were not chosen."""
        return self._counted is not None

    @property
    def n_sequences(self) -> int:
        return len(self.tokens) // self.context

    def spread(self, n: int) -> Int64[np.ndarray, " m"]:
        """The ids of at most `n` sequences, evenly over the stream: neighbours are of one document."""
        return np.linspace(0, self.n_sequences - 1, min(n, self.n_sequences)).round().astype(np.int64)

    def sequences(self, ids: Int[np.ndarray, " m"]) -> Sequences:
        """The sequences `ids`, each token with its document and its position in it."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.n_sequences):
            raise IndexError(f"sequence ids {ids.min()}..{ids.max()}, but there are {self.n_sequences}")
        at = ids[:, None] * self.context + np.arange(self.context)
        row = np.searchsorted(self.starts, at, side="right") - 1
        return Sequences(
            tokens=self.tokens[at].astype(np.int64),
            doc=self.doc_ids[row],
            pos=(at - self.starts[row]).astype(np.uint32),
            counted=np.ones(at.shape, dtype=bool) if self._counted is None else self._counted[at],
            conversations=self.has_conversations,
        )

    def locate(self, doc: int, pos: int) -> tuple[int, int]:
        """(sequence, offset) of position `pos` of document `doc`: the inverse of `sequences`."""
        start, end = self._span(doc)
        if not 0 <= pos < end - start:
            raise IndexError(f"pos={pos}, but document {doc} has {end - start} tokens")
        return divmod(start + int(pos), self.context)

    def places(self, doc: UInt64[np.ndarray, " m"], pos: UInt32[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Places in `tokens` of positions of documents; UserError for a document that is not here."""
        row = self._by_id[np.searchsorted(self.doc_ids, doc, sorter=self._by_id).clip(max=len(self._by_id) - 1)]
        if (other := np.flatnonzero(self.doc_ids[row] != doc)).size:
            raise UserError(self._missing(int(doc[other[0]])))
        return np.asarray(self.starts)[row] + pos

    def window(self, doc: int, pos: int, before: int, after: int) -> TokenWindow:
        """Token `pos` of document `doc` with up to `before` and `after` tokens around it, all of that document."""
        sequence, offset = self.locate(doc, pos)
        at = sequence * self.context + offset
        start, end = self._span(doc)
        first = max(start, at - before)
        return TokenWindow(self.tokens[first : min(end, at + after + 1)].astype(np.int64), at - first)

    def category(self, doc: int) -> str | None:
        return self.documents["category"][self._row(doc)].as_py()

    def source(self, doc: int) -> str:
        return self.documents["source"][self._row(doc)].as_py()

    def categories(self) -> dict[str | None, int]:
        """How many documents each category has."""
        counted = self.documents["category"].value_counts().to_pylist()
        return {c["values"]: c["counts"] for c in counted}

    def _span(self, doc: int) -> tuple[int, int]:
        row = self._row(doc)
        return int(self.starts[row]), int(self.starts[row + 1])

    def _row(self, doc: int) -> int:
        place = np.searchsorted(self.doc_ids, np.uint64(doc), sorter=self._by_id)
        row = int(self._by_id[min(int(place), len(self._by_id) - 1)])
        if int(self.doc_ids[row]) != int(doc):
            raise UserError(self._missing(doc))
        return row

    def _missing(self, doc: int) -> str:
        return f"document {doc} is not in {self.folder}; the activations were made from another text"
