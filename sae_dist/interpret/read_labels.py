"""Reads the labels of a run's latents (docs/labels.md)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from sae_dist.config import UserError
from sae_dist.run_files import read_json

FOLDER, TABLE, SCORES = "labels", "labels.parquet", "scores.json"  # the folder is a run's
CURE = "write it again with `sae-dist label RUN`"
KINDS = ("detection", "fuzzing")
OF_KIND = [  # columns of each kind of score
    ("", pa.float64()), ("_low", pa.float64()), ("_high", pa.float64()), ("_shuffled", pa.float64()),
    ("_items", pa.int32()), ("_why", pa.string()),
]  # fmt: skip
SCHEMA = pa.schema(
    [("latent", pa.int32()), ("label", pa.string()), ("by", pa.string())]
    + [(f"{kind}{name}", of) for kind in KINDS for name, of in OF_KIND]
)


class MeanScore(TypedDict):
    """Over latents, with a 95 % interval; null where there are too few."""

    value: float | None
    low: float | None
    high: float | None
    latents: int


class KindScores(TypedDict):
    """Balanced accuracy: of the labels, of labels of other latents, and what the former are better, by latents."""

    label: MeanScore
    shuffled: MeanScore
    gain: MeanScore
    chance: float
    beats: dict[str, bool | None]  # chance, shuffled; null: too few latents to tell
    not_scored: dict[str, int]  # latents by the reason
    said: str  # all this in a sentence


class Scores(TypedDict):
    """scores.json, as far as reading needs it."""

    format: int
    by: str
    latents: int
    labelled: int
    detection: KindScores
    fuzzing: KindScores


class Labels(Mapping[int, str]):
    """The label of every latent that has one, by its number."""

    def __init__(self, folder: Path) -> None:
        """UserError where there are none, or they are damaged."""
        self.folder = folder
        self.scores: Scores = read_json(folder / SCORES, Scores, cure=CURE)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """A row for each latent that was to be labelled, ascending: its label, who gave it, its scores."""
        if unknown := [name for name in columns or () if name not in SCHEMA.names]:
            raise UserError(f"column={unknown[0]} is not known; choose of {', '.join(SCHEMA.names)}")
        path = self.folder / TABLE
        try:
            return pq.read_table(path, columns=list(columns or SCHEMA.names), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged or missing ({str(error).splitlines()[0]}); {CURE}") from None

    @cached_property
    def _labels(self) -> dict[int, str]:
        latents, labels = (column.to_pylist() for column in self.table(["latent", "label"]))
        return {latent: label for latent, label in zip(latents, labels, strict=True) if label is not None}

    def __getitem__(self, latent: int) -> str:
        return self._labels[latent]

    def __iter__(self) -> Iterator[int]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)


def labels(where: str | PathLike[str]) -> Labels:
    """The labels of a run, or in their own folder: `labels("runs/mine")[123]`."""
    if "://" in str(where):
        raise UserError(f"{where} is not on a disk; copy the folder labels/ of that run to one")
    folder = Path(where).expanduser()
    return Labels(folder / FOLDER if (folder / FOLDER).is_dir() else folder)


def labels_of(file: pa.NativeFile, latents: Sequence[int]) -> pa.StringArray:
    """The labels of `latents` in an open labels.parquet, in their order; null where one has none."""
    wanted = np.asarray(latents, np.int64)
    first, last = (int(wanted.min()), int(wanted.max())) if len(wanted) else (0, -1)
    within = [("latent", ">=", first), ("latent", "<=", last)]  # other row groups are not read
    table = pq.read_table(file, columns=["latent", "label"], filters=within)
    place = np.full(last + 1, -1)
    place[table["latent"].to_numpy()] = np.arange(len(table))
    return table["label"].take(pa.array(place[wanted], mask=place[wanted] < 0)).combine_chunks().cast(pa.string())
