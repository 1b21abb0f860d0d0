"""The report of a sweep: a static page that opens from disk, its plots, and its points as data.

The page has no script and loads nothing but what lies beside it. Names, values and failures come from outside, so
everything that goes into it is escaped.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from sae_dist import storage
from sae_dist.sweep.page import main, overview, subtitle
from sae_dist.sweep.point import Point
from sae_dist.sweep.tables import Analysis, Table, analyse, tables

if TYPE_CHECKING:
    from sae_dist.sweep.drawing import Plot

STATIC = Path(__file__).parent / "static"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written, for a tracker too."""

    place: str  # of index.html
    tables: dict[str, Table]
    images: dict[str, bytes]  # PNG by name


def write_report(
    points: Sequence[Point], folder: str | Path, *, title: str, extrapolate_to: int | None = None
) -> Report:
    """Writes `<folder>/index.html` with all that it shows. `folder` may be on S3.

    `extrapolate_to` is a number of latents that the laws are continued to; None is a few times the largest one.
    The same points give the same files. Each is written whole, so a reader of an earlier report is not disturbed.
    """
    from sae_dist.sweep.drawing import png, svg  # altair takes a second to import
    from sae_dist.sweep.plots import plots

    analysis = analyse(points, extrapolate_to)
    found, pictures = tables(analysis), plots(analysis)
    files = {
        "index.html": page(analysis, found, pictures, title).encode(),
        "report.css": (STATIC / "report.css").read_bytes(),
        "points.csv": as_csv(found["points"]).encode(),
        "points.json": as_json(points, found).encode(),
    }
    images = {plot.name: png(plot) for plot in pictures}
    files |= {f"plots/{plot.name}.svg": svg(plot).encode() for plot in pictures}
    files |= {f"plots/{name}.png": image for name, image in images.items()}
    place = storage.open(folder)
    for name in sorted(files, key=lambda name: name == "index.html"):  # last, so that what it shows is there
        place.write(name, files[name])
    for old in list(place.list("plots/")):
        if old.key not in files:
            place.delete(old.key)
    return Report(f"{place.uri}/index.html", found, images)


def page(analysis: Analysis, found: dict[str, Table], pictures: Sequence["Plot"], title: str) -> str:
    """index.html."""
    shell = Template((STATIC / "report.html").read_text(encoding="utf-8"))
    return shell.substitute(
        title=escape(title),
        subtitle=escape(subtitle(analysis)),
        figures=overview(analysis),
        main=main(analysis, found, pictures),
    )


def as_csv(table: Table) -> str:
    """A table as CSV; text that a spreadsheet would take for a formula begins with an apostrophe."""
    columns = list(dict.fromkeys(name for line in table for name in line))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(line.get(name)) for name in columns] for line in table)
    return out.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def as_json(points: Sequence[Point], found: dict[str, Table]) -> str:
    """All points as the ledger knows them, and all tables."""
    content = {"points": [dataclasses.asdict(point) for point in points], "tables": found}
    return json.dumps(_finite(content), indent=1, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is none becomes null."""
    match value:
        case dict():
            return {str(key): _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None
        case _:
            return value
