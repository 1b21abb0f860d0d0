"""Writes the folder of a token stream, one document at a time; stream.py describes its files."""

import array
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from sae_dist.text.document import Document

TABLE_ROWS = 8192
SCHEMA = pa.schema([("doc", pa.uint64()), ("source", pa.string()), ("category", pa.string())])


class StreamWriter:
    """A stream that is being written; tokens after its last sequence are dropped."""

    def __init__(self, folder: Path, *, n_sequences: int, context: int, chats: bool):
        folder.mkdir(parents=True)
        self.folder, self.wanted, self.done = folder, n_sequences * context, 0
        self.starts, self.rows = array.array("q"), []
        self.tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.int32, (self.wanted,))
        counted = folder / "counted.npy"
        self.counted = np.lib.format.open_memmap(counted, "w+", np.bool_, (self.wanted,)) if chats else None
        self.table = pa.ipc.new_file(str(folder / "documents.arrow"), SCHEMA)
        (folder / "stream.json").write_text(json.dumps({"context": context}))

    @property
    def full(self) -> bool:
        return self.done == self.wanted

    @property
    def n_documents(self) -> int:
        return len(self.starts)

    def add(self, document: Document, *, doc: int, ids: list[int], counted: list[bool]) -> None:
        ids = ids[: self.wanted - self.done]
        if not ids:
            return
        self.starts.append(self.done)
        self.tokens[self.done : self.done + len(ids)] = ids
        if self.counted is not None:
            self.counted[self.done : self.done + len(ids)] = counted[: len(ids)]
        self.done += len(ids)
        self.rows.append({"doc": doc, "source": document.source, "category": document.category})
        if len(self.rows) == TABLE_ROWS:
            self._flush()

    def _flush(self) -> None:
        self.table.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=SCHEMA))
        self.rows = []

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, *_error: object) -> None:
        self._flush()
        self.table.close()
        self.tokens.flush()
        if self.counted is not None:
            self.counted.flush()
        np.save(self.folder / "starts.npy", np.append(np.asarray(self.starts, dtype=np.int64), self.done))
