"""The index of feature data: a narrow row a latent in one file, for lists and search (docs/features.md).

In memory it takes about 0.1 GB for a million latents, as arrays that are compared whole.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

INDEX = "index.parquet"
GROUP_LATENTS = 1 << 16  # of one row group
SCHEMA = pa.schema(
    [
        ("latent", pa.int32()), ("firings", pa.int64()), ("mean", pa.float64()), ("max", pa.float32()),
        ("category", pa.int16()), ("purity", pa.float32()), ("fires_on", pa.list_(pa.int32())),
        ("promoted", pa.list_(pa.int32())),
    ]
)  # fmt: skip
SOURCE = ["latent", "firings", "mean", "max", "category_share", "fires_on", "promoted"]  # columns that it is made of


def write_index(folder: Path, files: Iterable[str]) -> None:
    """Writes the index of these files of latents, in their order; one row group is in memory at a time."""
    path = folder / INDEX
    with pq.ParquetWriter(
        path, SCHEMA, compression="zstd", use_dictionary=False, write_page_checksum=True,
        write_statistics=["latent"],  # pyright: ignore[reportArgumentType]  it takes names of columns too
        store_schema=False,
    ) as writer:  # fmt: skip
        for rows in _grouped(pq.ParquetFile(folder / name).read(SOURCE, use_threads=False) for name in files):
            writer.write_table(index_rows(rows), row_group_size=GROUP_LATENTS)


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of GROUP_LATENTS rows each, the last one of what is left."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= GROUP_LATENTS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, GROUP_LATENTS)
            waiting = [whole.slice(GROUP_LATENTS)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


def index_rows(rows: pa.Table) -> pa.Table:
    """The rows of the index for rows of feature data."""
    category, purity = best_category(rows)
    columns = {name: rows[name] for name in SCHEMA.names if name in rows.schema.names}
    columns |= {"category": pa.array(category, pa.int16()), "purity": pa.array(purity, pa.float32())}
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def best_category(rows: pa.Table) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The category that has the largest share of each latent's activation, and that share.

    -1 and 0 where it never fired, or nothing has a category.
    """
    shares = rows["category_share"].combine_chunks()
    share = shares.flatten().to_numpy().reshape(len(rows), -1)
    if not share.shape[1]:
        return np.full(len(rows), -1), np.zeros(len(rows))
    return np.where(rows["firings"].to_numpy() > 0, share.argmax(1), -1), share.max(1)


class Lists(NamedTuple):
    """A list of tokens for each latent, end to end."""

    start: Int[np.ndarray, " n_plus_one"]
    tokens: Int[np.ndarray, " m"]

    def with_any(self, member: Bool[np.ndarray, " n_tokens"]) -> Bool[np.ndarray, " n"]:
        """Whether a list has a token of which `member` says true."""
        before = np.zeros(len(self.tokens) + 1, np.int32)
        np.cumsum(member[self.tokens], out=before[1:])
        return before[self.start[1:]] > before[self.start[:-1]]

    def of(self, latent: int) -> list[int]:
        return self.tokens[self.start[latent] : self.start[latent + 1]].tolist()


class Index(NamedTuple):
    """The columns of the index; a place is a latent's number."""

    firings: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    max: Float[np.ndarray, " n"]
    category: Int[np.ndarray, " n"]  # -1: none
    purity: Float[np.ndarray, " n"]
    fires_on: Lists
    promoted: Lists


def index_of(table: pa.Table) -> Index:
    """The rows of an index file, sorted by latent from 0 on, as arrays."""
    lists = (table[name].combine_chunks() for name in ("fires_on", "promoted"))
    return Index(
        *(table[name].to_numpy() for name in ("firings", "mean", "max", "category", "purity")),
        *(Lists(each.offsets.to_numpy(), each.values.to_numpy()) for each in lists),
    )
