"""The page of a comparison: it opens from disk, has no script, and looks like the feature pages that it links to.

Names and places come from outside, so everything that goes into it is escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sae_dist.comparison.compare import Comparison
from sae_dist.comparison.correlation import NONE
from sae_dist.comparison.figures import Figures
from sae_dist.comparison.html import KINDS, MEASURES, Linked, Links, against, largest, number, percent, rows_of, table
from sae_dist.comparison.pair_sections import CHILDREN, pair_sections, plot
from sae_dist.interpret.plain_page import plain_page

FEW = 20  # rows on which a latent that is listed fires at least: with fewer, an r of 1 means little
CORRELATION = (
    "<b>Correlation</b> is Pearson's r of two latents' activations over the held-out rows, zeros included. Latents "
    "that never fire on these rows are left out. A best match is the largest of many numbers, so chance alone gives "
    "one above 0: the line in each plot is what is left when the rows of one side are shuffled. "
)
OF_PAIRS = (
    "<b>Decoder cosine</b> is that of two latents' decoder rows; for the line, each coordinate of one decoder was "
    "shuffled over its latents. A latent of the larger dictionary belongs to the nearest one of the smaller, if the "
    "two match; where none matches, it is novel. Where novel latents say again what is there in part, it counts "
    "twice, so that the FVU can rise with them. That two latents match does not say that they mean the same: look at "
    "their contexts."
)
OF_STREAM = (
    "<b>Virtual weights.</b> What an earlier layer writes into the residual stream stays there, so that one of its "
    "latents moves a later one by its value times decoder row . encoder column, besides what it does through the "
    "layers between. A latent can raise another by being silent, where it would lower it. What is not carried, the "
    "layers between add."
)
OF_ONE = (
    "The <b>Jaccard index</b> is rows on which two latents are both active over those on which one is. That two "
    "latents fire together does not say that one causes the other."
)


def page(comparison: Comparison, links: Links, shown: int) -> str:
    """index.html."""
    figures, linked = comparison.figures, Linked(links)
    sections = {"Dictionaries": _dictionaries(figures, links)}
    if "coactivation" in figures:
        sections["Latents that fire together"] = _coactivation(comparison, linked, shown)
        meaning = CORRELATION + OF_ONE
    else:
        pairs, meaning = figures["pairs"], CORRELATION + OF_PAIRS
        if any(pair["virtual_weights"] for pair in pairs):
            meaning += f'</p><p class="prose">{OF_STREAM}'
        if len(pairs) > 1:
            sections["Every pair"] = _overview(pairs)
            sections["Trees"] = _trees(comparison, linked, shown)
        for pair in pairs:
            title = f"{pair['matches'][0]['of']} and {pair['matches'][1]['of']}: " if len(pairs) > 1 else ""
            own = pair_sections(comparison, pair, linked, shown)
            sections |= {f"{title}{name}": text for name, text in own.items()}
    sections["What the figures mean"] = f'<p class="prose">{meaning}</p>'
    sections["How this was made"] = _settings(figures)
    return plain_page(
        sections, kind="compare", kicker="Comparison", title=_title(figures), subtitle=_subtitle(figures),
        figures=_head(figures),
    )  # fmt: skip


def _title(figures: Figures) -> str:
    """The last words of the places, which are written out below."""
    places = (each["where"].rstrip("/").removesuffix("/dictionary") for each in figures["dictionaries"])
    return " and ".join(place.rpartition("/")[2] for place in places)


def _subtitle(figures: Figures) -> str:
    hooks = dict.fromkeys(f"{each['model']}, {each['hook']}" for each in figures["dictionaries"])
    return " · ".join([*hooks, f"{figures['rows']:,} held-out rows"])


def _head(figures: Figures) -> str:
    shown: dict[str, str] = {}
    if "coactivation" in figures:
        shown["strongest partner, median r"] = against(figures["coactivation"]["correlation"])
    elif len(figures["pairs"]) == 1:
        (pair,) = figures["pairs"]
        for own in pair["matches"]:
            shown[f"median r of {own['of']} in {own['in']}"] = against(own["correlation"])
        for name in ("one_to_one", "split"):
            shown[f"{KINDS[name]}, of {pair['smaller']}"] = f"{pair['splitting'][name]:,}"
        shown[f"novel in {pair['larger']}"] = f"{pair['splitting']['novel']:,}"
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in shown.items())


def _dictionaries(figures: Figures, links: Links) -> str:
    lines = []
    for each in figures["dictionaries"]:
        place = escape(each["where"])
        where = f'<a href="{escape(links[each["name"]])}/index.html">{place}</a>' if each["name"] in links else place
        k = "–" if each["k"] is None else f"{each['k']:,}"
        lines.append([
            escape(each["name"]), where, escape(str(each["variant"])), f"{each['n_latents']:,}", k,
            number(each["l0"], 1), f"{each['never_fire']:,}", escape(each["hook"]),
        ])  # fmt: skip
    return table(["", "dictionary", "kind", "latents", "k", "L0", "never fire", "hook point"], lines)


def _overview(pairs: Sequence[Figures]) -> str:
    lines = [
        [
            f"{own['of']} in {own['in']}", against(own["correlation"]),
            against(own["cosine"]) if "cosine" in own else "–",
            percent(own[pair["match"]]["matched"]["found"]["latents"]),
            percent(own[pair["match"]]["mutual"]["latents"]),
            f"{pair['splitting']['novel']:,}" if own["of"] == pair["larger"] else "",
        ]
        for pair in pairs
        for own in pair["matches"]
    ]  # fmt: skip
    return table(["", "median r", "median cosine", "matched", "nearest both ways", "novel"], lines)


def _trees(comparison: Comparison, linked: Linked, shown: int) -> str:
    """From the smallest dictionary to the largest: what each latent splits into, and these in turn."""
    sizes = {each["name"]: each["n_latents"] for each in comparison.figures["dictionaries"]}
    chain = sorted(sizes, key=sizes.__getitem__)
    if len(set(sizes.values())) < len(chain):
        return ""
    children = {
        small: rows_of(comparison.splits, "smaller", small, "larger", large)["children"]
        for small, large in zip(chain, chain[1:], strict=False)
    }
    lengths = pc.list_value_length(children[chain[0]]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    roots = [int(at) for at in largest(lengths, min(shown, 10)) if lengths[at] > 1]

    def tree(level: int, latent: int) -> str:
        name = chain[level]
        below = children[name][latent].as_py()[:CHILDREN] if name in children else []
        inner = "".join(tree(level + 1, each) for each in below)
        return f"<li>{name}/{linked(name, latent)}{f'<ul>{inner}</ul>' if inner else ''}</li>"

    note = f'<p class="note">{" → ".join(chain)}: the latents that split into most.</p>'
    return f'{note}<ul class="tree">{"".join(tree(0, root) for root in roots)}</ul>' if roots else ""


def _coactivation(comparison: Comparison, linked: Linked, shown: int) -> str:
    found = comparison.figures["coactivation"]
    (each,) = comparison.figures["dictionaries"]
    plots = [plot("Strongest partner", MEASURES[name], found[name]) for name in ("correlation", "jaccard")]
    own = comparison.partners.filter(pc.greater_equal(comparison.partners["firings"], FEW))  # pyright: ignore
    first = np.array([values[0] if values else NONE for values in own["r"].to_pylist()])
    lines = [
        [linked(each["name"], row["latent"]), f"{row['firings']:,}", _partners(linked, each["name"], row)]
        for row in own.take(largest(first, shown)).to_pylist()
        if row["partners"]
    ]
    note = f'<p class="note">Of latents that fire on {FEW} rows or more; of each partner r, and the Jaccard index.</p>'
    head = ["latent", "firings", "partners"]
    return f'<div class="plots">{"".join(plots)}</div><h3>The strongest partners</h3>{note}{table(head, lines)}'


def _partners(linked: Linked, name: str, row: Mapping[str, Any]) -> str:
    each = zip(row["partners"], row["r"], row["jaccard"], strict=True)
    return " ".join(f'<span class="near">{linked(name, at)} <i>{r:.2f}, {j:.2f}</i></span>' for at, r, j in each)


def _settings(figures: Figures) -> str:
    facts = figures["settings"] | {"rows that are not finite, left out": figures["left_out"]}
    facts |= {f"store of {each['name']}": each["store"] for each in figures["dictionaries"]}
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value is not None
    )
    return f'<div class="details"><dl>{rows}</dl></div>'
