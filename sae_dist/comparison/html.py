"""Pieces of a comparison's page: tables, numbers and links. Whoever fills a cell escapes what comes from outside."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_dist.comparison.figures import Figures

MEASURES = {"correlation": "correlation", "cosine": "decoder cosine", "jaccard": "Jaccard index"}
KINDS = {
    "one_to_one": "one to one", "split": "split into several", "shared": "shared with a nearer latent",
    "unmatched": "not matched", "never_fires": "never fire",
}  # fmt: skip
Links = Mapping[str, str]  # of each dictionary by name: where its feature pages are


class Linked:
    """Latents as links to their feature pages, where there are some."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def __call__(self, name: str, latent: int) -> str:
        place = self._links.get(name)
        return f"{latent}" if place is None else f'<a href="{escape(place)}/latent.html#{latent}">{latent}</a>'


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def against(found: Figures) -> str:
    """A median, beside that of chance."""
    own, chance = (found[name]["quantiles"] for name in ("found", "chance"))
    return f"{number(own and own['0.5'])} (by chance {number(chance and chance['0.5'])})"


def rows_of(rows: pa.Table, one: str, value: str, two: str, other: str) -> pa.Table:
    """Those whose columns `one` and `two` have these values."""
    return rows.filter(pc.and_(pc.equal(rows[one], value), pc.equal(rows[two], other)))  # pyright: ignore


def largest(values: np.ndarray, n: int) -> np.ndarray:
    """Places of the `n` largest, those of equal ones in their order."""
    return np.argsort(-values, kind="stable")[:n]
