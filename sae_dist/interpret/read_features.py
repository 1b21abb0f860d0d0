"""Reads feature data: rows of given latents, without the others."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from sae_dist.config import UserError
from sae_dist.interpret.feature_table import SCHEMA
from sae_dist.interpret.features import ABOUT, FORMAT, TOKENS, file_name
from sae_dist.run_files import read_json

CURE = "write it again with `sae-dist pages RUN data=true`"


class About(TypedDict):
    """features.json, as far as reading needs it."""

    format: int
    n_latents: int
    rows: int
    categories: list[str]
    category_rows: list[int]
    file_latents: int
    group_latents: int


class Features:
    """Feature data in a folder. May be used from several threads."""

    def __init__(self, folder: Path) -> None:
        """UserError where there is none, or of another format."""
        self.folder = folder
        self.about = read_json(folder / ABOUT, About, cure=CURE)
        if self.about["format"] != FORMAT:
            raise UserError(f"{folder / ABOUT} has format {self.about['format']}, this version reads {FORMAT}; {CURE}")

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
        path, size = self.folder / file_name(first), self.about["group_latents"]
        groups = sorted({(latent - first) // size for latent in latents})
        at = {group: number * size for number, group in enumerate(groups)}
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                found = file.read_row_groups(groups, columns=columns or SCHEMA.names)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged or missing ({str(error).splitlines()[0]}); {CURE}") from None
        order = [at[(latent - first) // size] + (latent - first) % size for latent in latents]
        return found.take(order).cast(pa.schema([SCHEMA.field(name) for name in found.schema.names]))

    def tokens(self) -> pa.Table:
        """Every token of the vocabulary: its id, and its text or its bytes."""
        return pq.read_table(self.folder / TOKENS)


def features(where: str | PathLike[str]) -> Features:
    """The feature data of a run, or in its own folder: `features("runs/mine").read([3, 17]).to_pylist()`."""
    if "://" in str(where):
        raise UserError(f"{where} is not on a disk; copy the folder features/ of that run to one")
    folder = Path(where).expanduser()
    return Features(folder / "features" if (folder / "features").is_dir() else folder)
