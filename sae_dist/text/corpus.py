"""The documents of the configured text, and a fingerprint of them."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from sae_dist.config import UserError, digest
from sae_dist.text import mixture, single
from sae_dist.text.chat import Conversations
from sae_dist.text.document import Document, clean
from sae_dist.text.mixture import MixtureText
from sae_dist.text.single import BuiltinText, FilesText, HuggingfaceText, JsonlText, ParquetText

TextConfig = Annotated[
    BuiltinText | FilesText | JsonlText | ParquetText | HuggingfaceText | MixtureText, Field(discriminator="kind")
]


def documents(config: TextConfig, *, seed: int | None = None, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Yields every document that is not empty, in the source's order, the same each time.

    `counts` counts documents that are changed: `empty` ones are left out, very long ones are `cut` into pieces, and in
    `undecodable` ones bytes that are not UTF-8 become U+FFFD.

    With a `seed`, the parts of a source (files, row groups, blocks of rows) are shuffled by it, so that the beginning
    of a sorted corpus is a sample of it.
    """
    counts = Counter() if counts is None else counts
    if isinstance(config, MixtureText):
        found = mixture.documents(config, seed, counts)
    else:
        found = single.documents(config, seed, counts)
    for document in found:
        yield from clean(document, counts)


def fingerprint(config: TextConfig) -> str:
    """Changes with the text, its order, its sources and its labels, but not when a folder is moved."""
    if isinstance(config, MixtureText):
        if not config.sources:
            raise UserError("text=mixture has no text.sources; give 'text.sources=[{kind: jsonl, path: a.jsonl}, ...]'")
        return digest(mixture.fingerprint(config))
    return digest(single.fingerprint(config))


def conversations(config: TextConfig) -> Conversations | None:
    """How conversations are read; None where all documents are texts. UserError where sources disagree."""
    sources = config.sources if isinstance(config, MixtureText) else (config,)
    chats = [source for source in sources if isinstance(source, Conversations) and source.messages]
    for other in chats[1:]:
        if (other.turns, other.template) != (chats[0].turns, chats[0].template):
            raise UserError("text.sources with conversations differ in turns or template; give all of them the same")
    return chats[0] if chats else None
