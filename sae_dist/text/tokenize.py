"""Tokenises text into two streams, training and held-out: built once, complete or absent, with checksums."""

import json
import logging
import random
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from sae_dist import checksums
from sae_dist.config import UserError, digest
from sae_dist.locks import file_lock
from sae_dist.text import corpus
from sae_dist.text.chat import ChatTemplate, ChatTokenizer, Encoded
from sae_dist.text.corpus import TextConfig
from sae_dist.text.document import Document
from sae_dist.text.split import SplitDocument, TextTally, shortage, split_documents
from sae_dist.text.stream import TokenStream
from sae_dist.text.stream_writer import StreamWriter

logger = logging.getLogger(__name__)

FORMAT = 2  # format 1 split by the exact text and had no checksums
SHUFFLE_CHARS = 64 << 20  # a corpus of at most this many characters is permuted as a whole
BATCH_CHARS = 1 << 20
# texts that show what a vocabulary does not: merges, normalisation, whitespace, digits, unknown characters
PROBES = ["The quick brown fox, isn't it?", " 12345 67\n\n\tdef f(x):", "naïve Ωmega 東京 \U0001f600", "AGTC4f/+=="]


class Tokenizer(Protocol):
    """The methods of a tokenizer that are used here, as in Hugging Face's fast tokenizers."""

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

    @property
    def counts(self) -> dict[str, int]:
        """How many documents were changed or left out: the counts of `corpus.documents`, `repeated` and `special`."""
        return json.loads((self.train.folder.parent / "counts.json").read_text())

    @property
    def digest(self) -> str:
        """The hash of the tokens of both streams and of where documents begin."""
        return checksums.combined(self.train.folder.parent, ".npy")


def separator(tokenizer: Tokenizer) -> int | None:
    """The token before every document: BOS, else EOS, else None."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Digest of the vocabulary, the separators and the tokens of a few probe texts."""
    return digest([tokenizer.get_vocab(), tokenizer.bos_token_id, tokenizer.eos_token_id, encode(tokenizer, PROBES)])


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The tokens of plain texts: "<|endoftext|>" in a document must not become that special token."""
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
    """Tokenises `n_tokens` of the text into whole sequences, a share of them held out, or reuses those in `folder`.

    Every document starts with the separator (BOS, else EOS) if the tokenizer has one; a conversation only where its
    template has not put it there. `progress` gets (tokens done,
    tokens wanted). If several processes call this at once, one builds and the others wait. Existing tokens are
    compared with their checksums, and made again when they are damaged.
    """
    sizes = _sizes(context=context, n_tokens=n_tokens, heldout_fraction=heldout_fraction)
    template = chat_template(config, tokenizer)
    recipe = {
        "format": FORMAT,
        "text": corpus.fingerprint(config),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "context": context,
        "n_tokens": n_tokens,
        "heldout_fraction": heldout_fraction,
        "seed": seed,
    } | ({} if template is None else template.identity)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / digest(recipe)[:20]
    with file_lock(folder / f".{final.name}.lock", waiting="another process tokenises the same text; waiting for it"):
        if final.is_dir() and (damage := checksums.damage(final)):
            logger.warning("tokens in %s are damaged (%s); they are made again", final, damage)
            shutil.rmtree(final)
        if not final.is_dir():
            for stale in folder.glob(f".{final.name}.*.part"):  # of a killed process: a living one would hold the lock
                shutil.rmtree(stale)
            part = folder / f".{final.name}.{uuid.uuid4().hex[:8]}.part"
            try:
                counts: Counter[str] = Counter()
                found = _shuffled(corpus.documents(config, seed=seed, counts=counts), seed)
                counts += _build(
                    part, found, tokenizer, template, sizes=sizes, heldout_fraction=heldout_fraction, progress=progress
                )
                (part / "counts.json").write_text(json.dumps({name: n for name, n in counts.items() if n}))
                (part / "recipe.json").write_text(json.dumps(recipe, indent=1))
                checksums.write(part)
                part.rename(final)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return TokenSplit(TokenStream(final / "train"), TokenStream(final / "heldout"))


def chat_template(config: TextConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What renders the text's conversations; None for a text of documents."""
    found = corpus.conversations(config)
    return None if found is None else ChatTemplate(cast(ChatTokenizer, tokenizer), found)


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
    template: ChatTemplate | None,
    *,
    sizes: _Sizes,
    heldout_fraction: float,
    progress: Callable[[int, int], None] | None,
) -> Counter[str]:
    """Writes both streams; returns how many documents were left out: `repeated`, or with a `special` token in them."""
    opened_by, left_out, chats = separator(tokenizer), Counter[str](), template is not None
    wanted = (sizes.train + sizes.heldout) * sizes.context
    tally = TextTally()
    with (
        StreamWriter(folder / "train", n_sequences=sizes.train, context=sizes.context, chats=chats) as train,
        StreamWriter(folder / "heldout", n_sequences=sizes.heldout, context=sizes.context, chats=chats) as heldout,
    ):
        for batch in _batches(
            split_documents(found, tally, train=train, heldout=heldout, heldout_fraction=heldout_fraction)
        ):
            for item, encoded in zip(batch, _encoded(batch, tokenizer, template), strict=True):
                if encoded is None:
                    left_out["special"] += 1
                    continue
                opened = _opened(encoded, opened_by, chats=chats)
                tally.tokenised_chars += len(item.document.text)
                tally.tokens += len(opened.ids)
                if encoded.ids:
                    item.side.add(item.document, doc=item.doc, ids=opened.ids, counted=opened.counted)
            if progress is not None:
                progress(train.done + heldout.done, wanted)
        if not (train.full and heldout.full):
            raise UserError(shortage(train, heldout, tally=tally, heldout_fraction=heldout_fraction))
    logger.info(
        "text tokenised: %s tokens to train on in %s documents, %s held out in %s; %s repeated documents left out",
        *(f"{n:,}" for n in (train.done, train.n_documents, heldout.done, heldout.n_documents, tally.n_repeated)),
    )
    left_out["repeated"] = tally.n_repeated
    return left_out


def _opened(encoded: Encoded, separator: int | None, *, chats: bool) -> Encoded:
    """The document with the separator before it, where its template has not put it there.

    In a stream with conversations that token does not count: no row may come of it, while a separator that ends a turn
    may become one.
    """
    if separator is None:
        return encoded
    there = 1 if chats and encoded.ids[:1] == [separator] else 0
    return Encoded([separator, *encoded.ids[there:]], [not chats, *encoded.counted[there:]])


def _encoded(
    batch: Sequence[SplitDocument], tokenizer: Tokenizer, template: ChatTemplate | None
) -> Iterator[Encoded | None]:
    """The tokens of each document; None for a conversation that is left out."""
    if template is None:
        for ids in encode(tokenizer, [item.document.text for item in batch]):
            yield Encoded(ids, [True] * len(ids))
        return
    for item in batch:
        document = item.document
        if document.messages is None:  # of a mixture of texts and conversations
            (ids,) = encode(tokenizer, [document.text])
            yield Encoded(ids, [True] * len(ids))
        else:
            yield template.encode(document.messages, document.source)


def _shuffled(found: Iterable[Document], seed: int) -> Iterator[Document]:
    """`found` shuffled by `seed`: a permutation of a corpus that fits into the buffer, else a streaming shuffle.

    When the buffer is full, each new document replaces a random one, which is yielded.
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


def _batches(items: Iterable[SplitDocument]) -> Iterator[list[SplitDocument]]:
    batch: list[SplitDocument] = []
    n_chars = 0
    for item in items:
        batch.append(item)
        n_chars += len(item.document.text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch
