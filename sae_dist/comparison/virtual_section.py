"""The section of a page on what feeds the latents of a dictionary further on in the same residual stream."""

from collections.abc import Mapping
from html import escape
from typing import Any

from sae_dist.comparison.compare import Comparison
from sae_dist.comparison.figures import Figures
from sae_dist.comparison.html import Linked, largest, number, percent, rows_of, table
from sae_dist.comparison.plots import histogram

PARTS = {
    "carried": "In the stream at {earlier} already", "by_latents": "Supplied by latents of {earlier}",
    "foremost": "Supplied by the foremost of these",
}  # fmt: skip


def virtual_section(comparison: Comparison, found: Figures, linked: Linked, shown: int) -> str:
    """Of what raises latents of the later dictionary: plots of shares, and the latents that fire most."""
    earlier, later = found["earlier"], found["later"]
    plots = "".join(_plot(words.format(earlier=earlier), found[name]) for name, words in PARTS.items())
    own = rows_of(comparison.inputs, "earlier", earlier, "later", later)
    lines = [
        [
            linked(later, row["latent"]), f"{row['firings']:,}", number(row["rise"], 2),
            percent(_share(row["carried"], row)), percent(_share(row["by_latents"], row)),
            _inputs(linked, earlier, row, ("raised_by", "supply", "weight")),
            _inputs(linked, earlier, row, ("lowered_by", "lowered_supply", "lowered_weight")),
        ]
        for row in own.take(largest(own["firings"].to_numpy(), shown)).to_pylist()
        if row["rise"] is not None
    ]  # fmt: skip
    head = [f"latent of {later}", "firings", "rise", f"carried from {earlier}", "by its latents", "raised by",
            "lowered by"]  # fmt: skip
    apart = percent(found["heaviest_apart"])
    note = (
        f'<p class="note">Shares of the rise: by how much the pre-activation is above its mean where the latent is '
        f"active. Beside each latent of {escape(earlier)} its share, and the virtual weight. {apart} of the latents "
        "never fire with the one of their largest virtual weight.</p>"
    )
    return f'<div class="plots">{plots}</div>{note}{table(head, lines)}'


def _plot(title: str, found: Figures) -> str:
    own, chance = found.get("found", found), found.get("chance")
    median = own["quantiles"] and own["quantiles"]["0.5"]
    said = f"{own['latents']:,} latents; median {percent(median)}"
    if chance is not None:
        said += f", by chance {percent(chance['quantiles'] and chance['quantiles']['0.5'])}"
    line = [0] * len(own["histogram"]) if chance is None else chance["histogram"]
    drawn = histogram(own["histogram"], line, median)
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(said)}</figcaption>{drawn}</figure>"


def _share(part: float | None, row: Mapping[str, Any]) -> float | None:
    return part / row["rise"] if part is not None and row["rise"] > 0 else None


def _inputs(linked: Linked, name: str, row: Mapping[str, Any], columns: tuple[str, str, str]) -> str:
    each = zip(*(row[column] for column in columns), strict=True)
    return " ".join(
        f'<span class="near">{linked(name, latent)} <i>{percent(_share(supply, row))}, {weight:+.2f}</i></span>'
        for latent, supply, weight in each
    )
