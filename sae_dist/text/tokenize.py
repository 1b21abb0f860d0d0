"""Text to two token streams, one to train on and one held out: streaming, built once, complete or absent.

Which side a document is on is a function of its text alone, so neither the order of a corpus nor a repeated document
can carry text from one side to the other.
"""

import array
import contextlib
import fcntl
import json
import logging
import random
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from sae_dist.config import UserError, digest
from sae_dist.text import corpus
from sae_dist.text.corpus import TextConfig
from sae_dist.text.document import Document
from sae_dist.text.stream import TokenStream

logger = logging.getLogger(__name__)

FORMAT = 1
SHUFFLE_CHARS = 64 << 20  # a corpus of at most so many characters is permuted as a whole
BATCH_CHARS = 1 << 20
TABLE_ROWS = 8192
HELDOUT_SALT = 0x5AE0  # not the run's seed: what one run holds out, no other run trains on
SCHEMA = pa.schema([("doc", pa.uint64()), ("source", pa.string()), ("category", pa.string())])
# what a vocabulary does not show: merges, normalisation, whitespace, digits, unknown characters
PROBES = ["The quick brown fox, isn't it?", " 12345 67\n\n\tdef f(x):", "naïve Ωmega 東京 \U0001f600", "AGTC4f/+=="]


class Tokenizer(Protocol):
    """What is needed of a tokenizer; Hugging Face's fast ones have it."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def get_vocab(self) -> dict[str, int]: ...
    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> Mapping[str, list[list[int]]]: ...


class TokenSplit(NamedTuple):
    train: TokenStream
    heldout: TokenStream


def separator(tokenizer: Tokenizer) -> int | None:
    """The token that opens every document: BOS, else EOS, where the tokenizer has one."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Digest of the vocabulary, the separators, and what becomes of a few probes; a tokenizer's name says nothing."""
    return digest([tokenizer.get_vocab(), tokenizer.bos_token_id, tokenizer.eos_token_id, _encode(tokenizer, PROBES)])


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of the plain text: a document that spells "<|endoftext|>" must not become that control token."""
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]]


def tokenize(
    config: TextConfig,
    tokenizer: Tokenizer,
    *,
    context: int,
    n_tokens: int,
    heldout_fraction: float,
    seed: int,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> TokenSplit:
    """`n_tokens` tokens of the text in whole sequences, a share of them held out; reused where `folder` has them.

    Every document is opened by the separator (BOS, else EOS) where the tokenizer has one. `progress` is told
    (tokens done, tokens wanted). Several processes may call this at once: one builds, the others wait for it.
    """
    sizes = _sizes(context=context, n_tokens=n_tokens, heldout_fraction=heldout_fraction)
    recipe = {
        "format": FORMAT,
        "text": corpus.fingerprint(config),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "context": context,
        "n_tokens": n_tokens,
        "heldout_fraction": heldout_fraction,
        "seed": seed,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / digest(recipe)[:20]
    with _locked(folder / f".{final.name}.lock"):
        if not final.is_dir():
            for stale in folder.glob(f".{final.name}.*.part"):  # of a build that was killed: we hold its lock
                shutil.rmtree(stale)
            part = folder / f".{final.name}.{uuid.uuid4().hex[:8]}.part"
            try:
                found = _shuffled(corpus.documents(config), seed)
                _build(part, found, tokenizer, sizes=sizes, heldout_fraction=heldout_fraction, progress=progress)
                (part / "recipe.json").write_text(json.dumps(recipe, indent=1))
                part.rename(final)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return TokenSplit(TokenStream(final / "train"), TokenStream(final / "heldout"))


class _Sizes(NamedTuple):
    context: int
    train: int  # sequences
    heldout: int


def _sizes(*, context: int, n_tokens: int, heldout_fraction: float) -> _Sizes:
    if context < 1:
        raise UserError(f"context={context} tokens a sequence; use 1 or more")
    if not 0 <= heldout_fraction < 1:
        raise UserError(f"heldout_fraction={heldout_fraction} is not a share; use 0 (nothing held out) up to below 1")
    n_sequences = n_tokens // context
    heldout = max(1, round(n_sequences * heldout_fraction)) if heldout_fraction else 0
    if n_sequences - heldout < 1:
        raise UserError(
            f"n_tokens={n_tokens:,} is {n_sequences} sequences of context={context}, {heldout} of them held out: none "
            f"is left to train on; use n_tokens={context * (heldout + 1):,} or more"
        )
    return _Sizes(context, n_sequences - heldout, heldout)


def _build(
    folder: Path,
    found: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    sizes: _Sizes,
    heldout_fraction: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    opened_by = separator(tokenizer)
    opening = [] if opened_by is None else [opened_by]
    wanted = (sizes.train + sizes.heldout) * sizes.context
    seen: set[int] = set()
    n_chars = n_repeated = 0
    with (
        _Writer(folder / "train", sizes.train, sizes.context) as train,
        _Writer(folder / "heldout", sizes.heldout, sizes.context) as heldout,
    ):

        def to_encode() -> Iterator[tuple[Document, int, _Writer]]:
            nonlocal n_chars, n_repeated
            for document in found:
                text = document.text.encode()
                doc = xxhash.xxh3_64_intdigest(text)
                n_chars += len(document.text)
                if doc in seen:
                    n_repeated += 1
                    continue
                seen.add(doc)
                side = heldout if xxhash.xxh3_64_intdigest(text, HELDOUT_SALT) < heldout_fraction * 2**64 else train
                if not side.full:
                    yield document, doc, side
                elif train.full and heldout.full:
                    return

        for batch in _batches(to_encode()):
            encoded = _encode(tokenizer, [document.text for document, _, _ in batch])
            for (document, doc, side), ids in zip(batch, encoded, strict=True):
                if len(ids):
                    side.add(document, doc, [*opening, *ids])
            if progress is not None:
                progress(train.done + heldout.done, wanted)
            if train.full and heldout.full:
                break
        if not (train.full and heldout.full):
            raise UserError(_too_short(train, heldout, n_documents=len(seen), n_chars=n_chars))
    logger.info(
        "text tokenised: %s tokens to train on in %s documents, %s held out in %s; %s repeated documents left out",
        *(f"{n:,}" for n in (train.done, train.n_documents, heldout.done, heldout.n_documents, n_repeated)),
    )


def _too_short(train: "_Writer", heldout: "_Writer", *, n_documents: int, n_chars: int) -> str:
    shares = [side.done / side.wanted for side in (train, heldout) if side.wanted]
    enough = int(min(shares) * (train.wanted + heldout.wanted))
    cure = f"ask for fewer (harvest.tokens={enough}) or give more text" if enough else "give more text"
    return (
        f"the text is too short: {train.done:,} of {train.wanted:,} training tokens and {heldout.done:,} of "
        f"{heldout.wanted:,} held-out ones in {n_documents:,} documents of {n_chars:,} characters; {cure}"
    )


def _shuffled(found: Iterable[Document], seed: int) -> Iterator[Document]:
    """`found` in an order that is a function of `seed`: a permutation of a corpus that fits, else a streaming shuffle.

    With the buffer full, each new document drives out one chosen at random.
    """
    generator = random.Random(seed)
    held: list[Document] = []
    n_chars = 0
    for document in found:
        held.append(document)
        n_chars += len(document.text)
        while n_chars > SHUFFLE_CHARS:
            chosen = generator.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            out = held.pop()
            n_chars -= len(out.text)
            yield out
    generator.shuffle(held)
    while held:
        yield held.pop()


def _batches(items: Iterable[tuple[Document, int, "_Writer"]]) -> Iterator[list[tuple[Document, int, "_Writer"]]]:
    batch: list[tuple[Document, int, _Writer]] = []
    n_chars = 0
    for item in items:
        batch.append(item)
        n_chars += len(item[0].text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes one `TokenStream` folder; what comes after its last sequence is cut off."""

    def __init__(self, folder: Path, n_sequences: int, context: int):
        folder.mkdir(parents=True)
        self.folder, self.wanted, self.done = folder, n_sequences * context, 0
        self.starts, self.rows = array.array("q"), []
        self.tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.int32, (self.wanted,))
        self.table = pa.ipc.new_file(str(folder / "documents.arrow"), SCHEMA)
        (folder / "stream.json").write_text(json.dumps({"context": context}))

    @property
    def full(self) -> bool:
        return self.done == self.wanted

    @property
    def n_documents(self) -> int:
        return len(self.starts)

    def add(self, document: Document, doc: int, ids: list[int]) -> None:
        ids = ids[: self.wanted - self.done]
        if not ids:
            return
        self.starts.append(self.done)
        self.tokens[self.done : self.done + len(ids)] = ids
        self.done += len(ids)
        self.rows.append({"doc": doc, "source": document.source, "category": document.category})
        if len(self.rows) == TABLE_ROWS:
            self._flush()

    def _flush(self) -> None:
        self.table.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=SCHEMA))
        self.rows = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_error: object) -> None:
        self._flush()
        self.table.close()
        self.tokens.flush()
        np.save(self.folder / "starts.npy", np.append(np.asarray(self.starts, dtype=np.int64), self.done))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock on `path`; the system lets go of it when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process tokenises the same text; waiting for it (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
