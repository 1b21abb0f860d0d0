"""Hugging Face datasets: by name, or a local folder, whole or streaming."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_dist.config import UserError, digest, frozen
from sae_dist.text import chat
from sae_dist.text.chat import Conversations
from sae_dist.text.document import Document, shuffled_parts

if TYPE_CHECKING:
    import datasets

BLOCK_ROWS = 256


@frozen
class HuggingfaceText(Conversations):
    """Each row is a document."""

    kind: Literal["huggingface"] = "huggingface"
    path: str = ""
    """A dataset's name, a folder of data files, or a folder written by `save_to_disk`."""
    name: str = ""
    """The dataset's configuration; empty: its default."""
    split: str = "train"
    field: str = "text"
    """The column that holds the text."""
    category: str = ""
    """The column that labels a document; empty: none."""
    streaming: bool = True
    """Read as it arrives; otherwise it is first fetched whole."""
    revision: str = "main"
    """A branch, tag or commit; a commit pins the text for ever."""


def documents(config: HuggingfaceText, seed: int | None) -> Iterator[Document]:
    rows = _load(config)
    there = rows.column_names  # None for a stream that does not know them before its first row
    if there is not None:
        _check(there, config)
    for i, row in _readable(config, _numbered(rows, seed)):
        if there is None:
            there = list(row)
            _check(there, config)
        source = f"{Path(config.path).name}/{config.split}:{i}"
        label = row.get(config.category) if config.category else None
        category = None if label is None else str(label)
        if config.messages:
            yield chat.document(row.get(config.messages), source, category)
            continue
        text = row.get(config.field, 0)
        if not isinstance(text, str | None):
            raise UserError(f"{source} has no text in {config.field!r}; its columns: {', '.join(row)}; set text.field=")
        yield Document(text or "", source, category)


def _columns(config: HuggingfaceText) -> dict[str, str]:
    """The columns that are read, by the keys that name them."""
    content = {"messages": config.messages} if config.messages else {"field": config.field}
    return content | ({"category": config.category} if config.category else {})


def _check(there: Sequence[str], config: HuggingfaceText) -> None:
    """UserError, with the key that names it, for a column that is not there."""
    for key, column in _columns(config).items():
        if column not in there:
            raise UserError(f"{config.path} has no column {column!r}; it has {', '.join(there)}; set text.{key}=")


def _readable(
    config: HuggingfaceText, rows: Iterator[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`rows`; UserError for a damaged file."""
    with _dataset_errors(config):
        yield from rows


def _numbered(
    rows: "datasets.Dataset | datasets.IterableDataset", seed: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row): a stream in its order, anything else in shuffled blocks."""
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        yield from enumerate(rows)
        return
    for start in shuffled_parts(range(0, len(rows), BLOCK_ROWS), seed):
        for i in range(start, min(start + BLOCK_ROWS, len(rows))):
            yield i, rows[i]


def fingerprint(config: HuggingfaceText) -> str:
    """Digest of the identity that `datasets` gives the data: the commit of a name, the files of a folder."""
    import datasets

    rows = _saved(config)
    if rows is not None:
        identity = rows._fingerprint
    else:
        with _dataset_errors(config):
            identity = datasets.load_dataset_builder(config.path, config.name or None, revision=config.revision).hash
    return digest([identity, config.split, config.field, config.category, *config.chat_fingerprint])


def _load(config: HuggingfaceText) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    rows = _saved(config)
    if rows is not None:
        return rows
    with _dataset_errors(config):
        return datasets.load_dataset(
            config.path,
            config.name or None,
            split=config.split,
            streaming=config.streaming,
            revision=config.revision,
        )


def _saved(config: HuggingfaceText) -> "datasets.Dataset | None":
    """The split that `save_to_disk` wrote at `path`; None if there is none."""
    import datasets

    if not config.path:
        raise UserError("text.path='' names no dataset; set text.path=NAME or text.path=FOLDER")
    folder = Path(config.path)
    if not any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return None
    loaded = datasets.load_from_disk(config.path)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if config.split not in loaded:
        raise UserError(f"text.split={config.split!r} is not in {config.path}; it has {', '.join(map(str, loaded))}")
    return loaded[config.split]


@contextlib.contextmanager
def _dataset_errors(config: HuggingfaceText) -> Iterator[None]:
    """Turns errors of `datasets` about a name, configuration, split or revision into a UserError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"text.path={config.path!r} cannot be loaded: {reason}; check text.path, name, split") from None
