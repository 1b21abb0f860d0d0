"""The files of a comparison: data first, the page last, each written whole."""

from pathlib import Path

import pyarrow as pa

from sae_dist.comparison.compare import Comparison
from sae_dist.comparison.html import Links
from sae_dist.comparison.page import page
from sae_dist.interpret.parquet import write_parquet
from sae_dist.interpret.plain_page import write_plain_page
from sae_dist.run_files import write_json

STYLES = Path(__file__).parent / "static" / "compare.css"
TABLES = ("matches", "splits", "inputs", "partners")


def write(out: Path, comparison: Comparison, *, links: Links, shown: int) -> None:
    """Writes index.html, compare.json and the tables that have rows into `out`; the same comparison, the same bytes.

    `links`: where the feature pages of a dictionary are, from `out`. Tables of an earlier comparison are removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        rows: pa.Table = getattr(comparison, name)
        path = out / f"{name}.parquet"
        if len(rows):
            write_parquet(path, rows)
        else:
            path.unlink(missing_ok=True)
    write_json(out / "compare.json", comparison.figures)
    write_plain_page(out, page(comparison, links, shown), STYLES)
