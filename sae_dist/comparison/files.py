"""The files of a comparison: data first, the page last, each written whole."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sae_dist.comparison.compare import Comparison
from sae_dist.comparison.page import STATIC, Links, page
from sae_dist.interpret import site
from sae_dist.run_files import write_json, write_whole

TABLES = ("matches", "splits", "partners")


def write(out: Path, comparison: Comparison, *, links: Links, shown: int) -> None:
    """Writes index.html, compare.json and the tables that have rows into `out`; the same comparison, the same bytes.

    `links`: where the feature pages of a dictionary are, from `out`. Tables of an earlier comparison are removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        rows: pa.Table = getattr(comparison, name)
        path = out / f"{name}.parquet"
        if len(rows):
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            pq.write_table(rows, temporary, compression="zstd")
            os.replace(temporary, path)
        else:
            path.unlink(missing_ok=True)
    write_json(out / "compare.json", comparison.figures)
    shutil.copyfile(site.STATIC / "site.css", out / "site.css")
    shutil.copyfile(STATIC / "compare.css", out / "compare.css")
    write_whole(out / "index.html", page(comparison, links, shown))
