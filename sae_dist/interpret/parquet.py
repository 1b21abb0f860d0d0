"""Parquet files that are complete or absent."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(path: Path, rows: pa.Table, **layout: Any) -> None:
    """Writes a table, compressed by zstd; `layout` is more for pyarrow. What a killed process left is overwritten."""
    temporary = path.with_name(f".{path.name}")
    pq.write_table(rows, temporary, compression="zstd", **layout)
    os.replace(temporary, path)
