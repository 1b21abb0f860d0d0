"""Reads feature data: rows of given latents without the others, and which latents match a search."""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from typing_extensions import TypedDict

from sae_dist.config import UserError
from sae_dist.interpret.feature_index import INDEX, index_of
from sae_dist.interpret.feature_table import SCHEMA
from sae_dist.interpret.features import ABOUT, FORMAT, TOKENS, file_name
from sae_dist.interpret.read_labels import FOLDER as LABELS
from sae_dist.interpret.read_labels import TABLE as LABEL_TABLE
from sae_dist.interpret.read_labels import labels_of
from sae_dist.interpret.search import Query, Searched, select
from sae_dist.run_files import parse_json

CURE = "write it again with `sae-dist pages RUN data=true`"
FEATURES = "features"  # folder of a run

# (folder of the run, name) -> the open file; FileNotFoundError where there is none
OpenFile = Callable[[str, str], AbstractContextManager[pa.NativeFile]]


class About(TypedDict):
    """features.json, as far as reading needs it."""

    format: int
    n_latents: int
    rows: int
    categories: list[str]
    category_rows: list[int]
    file_latents: int
    group_latents: int
    no_outputs: str | None
    weights: NotRequired[str]  # the hash of the dictionary's weights
    summary: dict[str, Any]


class Format(TypedDict):
    """features.json of any format."""

    format: int


class Features:
    """Feature data in a folder. May be used from several threads."""

    def __init__(self, folder: Path, open_file: OpenFile | None = None) -> None:
        """`open_file` opens the files of a run that is not on a disk; `folder` only names it then.

        UserError where there is none, or of another format.
        """
        self.folder, self._open, self._lock = folder, open_file or _beside(folder), threading.Lock()
        self._searched: Searched | None = None
        try:
            with self._open(FEATURES, ABOUT) as file:
                text = file.read()
        except OSError:
            raise UserError(f"{folder / ABOUT} is missing; {CURE}") from None
        if (found := self._parsed(text, Format)["format"]) != FORMAT:
            raise UserError(f"{folder / ABOUT} has format {found}, this version reads {FORMAT}; {CURE}")
        self.about = self._parsed(text, About)

    def _parsed(self, text: bytes, shape: Any) -> Any:
        return parse_json(text, shape, name=str(self.folder / ABOUT), cure=CURE)

    @property
    def n_latents(self) -> int:
        return self.about["n_latents"]

    @property
    def rows(self) -> int:
        """Tokens of the stream that the figures are of."""
        return self.about["rows"]

    @property
    def categories(self) -> Sequence[str]:
        """Names of what the category columns and contexts number."""
        return self.about["categories"]

    def read(self, latents: Iterable[int], columns: Sequence[str] | None = None) -> pa.Table:
        """A row for each of `latents`, in their order; all columns, or these.

        UserError for a latent or column that there is not, and for a damaged file.
        """
        if unknown := [name for name in columns or () if name not in SCHEMA.names]:
            raise UserError(f"column={unknown[0]} is not known; choose of {', '.join(SCHEMA.names)}")
        wanted = [int(latent) for latent in latents]
        if outside := [latent for latent in wanted if not 0 <= latent < self.n_latents]:
            raise UserError(f"latent={outside[0]} is not there; the dictionary has 0 to {self.n_latents - 1}")
        size = self.about["file_latents"]
        parts, place = [SCHEMA.empty_table().select(columns or SCHEMA.names)], dict[int, int]()
        for first in sorted({latent // size * size for latent in wanted}):
            own = sorted({latent for latent in wanted if first <= latent < first + size})
            place |= {latent: len(place) + at for at, latent in enumerate(own)}
            parts.append(self._of_file(first, own, columns))
        return pa.concat_tables(parts).take(pa.array([place[latent] for latent in wanted], pa.int64()))

    def _of_file(self, first: int, latents: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
        """The rows of a file's latents, of which the row groups with others alone are not read."""
        size = self.about["group_latents"]
        groups = sorted({(latent - first) // size for latent in latents})
        at = {group: number * size for number, group in enumerate(groups)}
        found = self._table(file_name(first), lambda file: file.read_row_groups(groups, columns or SCHEMA.names))
        order = [at[(latent - first) // size] + (latent - first) % size for latent in latents]
        return found.take(order).cast(pa.schema([SCHEMA.field(name) for name in found.schema.names]))

    def _table(self, name: str, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        """What `read` takes of a Parquet file; UserError where it is damaged or missing."""
        try:
            with (
                self._open(FEATURES, name) as source,
                pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True) as file,
            ):
                return read(file)
        except (OSError, pa.ArrowException) as error:
            place = self.folder / name
            raise UserError(f"{place} is damaged or missing ({str(error).splitlines()[0]}); {CURE}") from None

    def tokens(self) -> pa.Table:
        """Every token of the vocabulary: its id, its text or its bytes, and whether it is a special token."""
        return self._table(TOKENS, lambda file: file.read())

    def search(self, words: str, *, sort: str = "max", descending: bool = True) -> Int[np.ndarray, " n"]:
        """Numbers of the latents that fired and have every word, the strongest first.

        A word is part of a token that a latent fires on, of its category or label, or is its number; "quoted": a whole
        token; cat:prose, label:name; promotes:ing is part of an output token that it promotes. `sort`: max, density,
        mean, purity or latent.
        """
        return select(self.searched(), Query(words, sort, descending))

    def searched(self) -> Searched:
        """The index and what else words are looked for in, which are read once and kept."""
        with self._lock:
            if self._searched is None:
                self._searched = Searched(
                    index_of(self._table(INDEX, lambda file: file.read())), max(self.rows, 1), _texts(self.tokens()),
                    self.categories, self.labels(range(self.n_latents)),
                )  # fmt: skip
            return self._searched

    def labels(self, latents: Sequence[int]) -> pa.StringArray | None:
        """The labels of `latents`, null where one has none; None for a run without labels."""
        try:
            with self._open(LABELS, LABEL_TABLE) as file:
                return labels_of(file, latents)
        except FileNotFoundError:
            return None


def _beside(folder: Path) -> OpenFile:
    """Files on a disk: of `folder`, and of other folders of the same run."""
    return lambda kind, name: pa.OSFile(str((folder if kind == FEATURES else folder.parent / kind) / name))


def _texts(tokens: pa.Table) -> pa.StringArray:
    """Texts of tokens by their id, in lower case; "" for bytes and for ids without a token."""
    texts = np.full(int(tokens["token"].to_numpy().max(initial=-1)) + 1, "", dtype=object)
    texts[tokens["token"].to_numpy()] = [(text or "").lower() for text in tokens["text"].to_pylist()]
    return pa.array(texts, pa.string())


def features(where: str | PathLike[str]) -> Features:
    """The feature data of a run, or in its own folder: `features("runs/mine").read([3, 17]).to_pylist()`."""
    if "://" in str(where):
        raise UserError(f"{where} is not on a disk; copy the folder features/ of that run to one")
    folder = Path(where).expanduser()
    return Features(folder / FEATURES if (folder / FEATURES).is_dir() else folder)
