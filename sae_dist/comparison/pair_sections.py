"""The sections of a page that are of two dictionaries: matches, splitting, stitching."""

import itertools
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import pyarrow.compute as pc

from sae_dist.comparison.compare import Comparison
from sae_dist.comparison.figures import Figures
from sae_dist.comparison.html import KINDS, MEASURES, Linked, largest, number, percent, rows_of, table
from sae_dist.comparison.plots import histogram
from sae_dist.comparison.virtual_section import virtual_section

CHILDREN = 12  # of a latent that a row of the page lists
STAGES = {
    "smaller": "{small} as it is", "novel_added": "{small} and the novel latents of {large}",
    "chance_added": "{small} and as many latents of {large}, drawn by chance",
    "swapped": "{small} with its matched latents replaced by those of {large}",
    "chance_swapped": "the same with as many latents of {large}, drawn by chance",
    "stitched": "replaced and novel: all of {large}, and what is left of {small}", "larger": "{large} as it is",
}  # fmt: skip


def pair_sections(comparison: Comparison, pair: Figures, linked: Linked, shown: int) -> dict[str, str]:
    sections = {
        "Best matches": _matches(comparison, pair, linked, shown),
        f"How latents of {pair['smaller']} split in {pair['larger']}": _splitting(comparison, pair, linked, shown),
        f"What {pair['larger']} adds": _stitching(comparison, pair, linked, shown),
    }
    if (found := pair["virtual_weights"]) is not None:
        sections[f"What feeds latents of {found['later']}"] = virtual_section(comparison, found, linked, shown)
    return sections


def _matches(comparison: Comparison, pair: Figures, linked: Linked, shown: int) -> str:
    plots, rows, matched = list[str](), list[list[str]](), list[list[str]]()
    for own, measure in itertools.product(pair["matches"], MEASURES):
        if measure not in own:
            continue
        found, name = own[measure], f"{own['of']} in {own['in']}"
        plots.append(plot(name, MEASURES[measure], found))
        rows += _quantiles(f"{name}, {MEASURES[measure]}", found)
        shares = found["matched"]["found"], found["matched"]["chance"]
        matched.append([
            f"{name}, {MEASURES[measure]}", *(percent(each["latents"]) for each in shares),
            percent(shares[0]["firings"]), percent(found["mutual"]["latents"]),
        ])  # fmt: skip
    head = ["best match", "mean", "5 %", "25 %", "median", "75 %", "95 %"]
    names = {"cosine": "cosine", "virtual_weights": "virtual weights"}  # the rest has a section that says so
    why = "".join(
        f'<p class="note">No {words}: {escape(pair["not_measured"][name])}.</p>'
        for name, words in names.items()
        if name in pair["not_measured"]
    )
    return (
        f'<div class="plots">{"".join(plots)}</div>{table(head, rows)}'
        + table([f"{pair['level']:g} or more", "of latents", "by chance", "of firings", "nearest both ways"], matched)
        + f"{why}<h3>The latents that fire most</h3>{_most_active(comparison, pair, linked, shown)}"
    )


def plot(title: str, measure: str, found: Figures) -> str:
    own, chance = found["found"], found["chance"]
    median = own["quantiles"] and own["quantiles"]["0.5"]
    said = f"{own['latents']:,} latents; median {number(median)}, by chance " + number(
        chance["quantiles"] and chance["quantiles"]["0.5"]
    )
    drawn = histogram(own["histogram"], chance["histogram"], median)
    return f"<figure><figcaption><b>{escape(title)}: {escape(measure)}</b>{escape(said)}</figcaption>{drawn}</figure>"


def _quantiles(name: str, found: Figures) -> Iterator[list[str]]:
    own, chance = found["found"], found["chance"]
    for words, each in ((name, own), ("by chance", chance)):
        if each["quantiles"] is not None:
            yield [escape(words), number(each["mean"]), *(number(value) for value in each["quantiles"].values())]


def _most_active(comparison: Comparison, pair: Figures, linked: Linked, shown: int) -> str:
    first, second = (own["of"] for own in pair["matches"])
    own = rows_of(comparison.matches, "dictionary", first, "other", second)
    lines = [
        [
            linked(first, each["latent"]), f"{each['firings']:,}", _linked(linked, second, each["match"]),
            number(each["r"]), number(each["cosine"]), number(each["second_r"]),
            _linked(linked, second, each["nearest"]), number(each["nearest_cosine"]),
        ]
        for each in own.take(largest(own["firings"].to_numpy(), shown)).to_pylist()
    ]  # fmt: skip
    head = [f"latent of {first}", "firings", f"match in {second}", "r", "its cosine", "second r", "nearest", "cosine"]
    return table(head, lines)


def _linked(linked: Linked, name: str, latent: int | None) -> str:
    return "–" if latent is None else linked(name, latent)


def _splitting(comparison: Comparison, pair: Figures, linked: Linked, shown: int) -> str:
    counts, small, large = pair["splitting"], pair["smaller"], pair["larger"]
    alive = sum(counts[kind] for kind in KINDS if kind != "never_fires")
    lines = [
        [words, f"{counts[kind]:,}", percent(counts[kind] / alive) if alive and kind != "never_fires" else ""]
        for kind, words in KINDS.items()
    ]
    found = rows_of(comparison.splits, "smaller", small, "larger", large)
    lengths = pc.list_value_length(found["children"]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    rows = [
        [linked(small, each["latent"]), f"{len(each['children']):,}", _children(linked, large, each)]
        for each in found.take(largest(lengths, shown)).to_pylist()
        if len(each["children"]) > 1
    ]
    most = table([f"latent of {small}", "latents", f"those of {large} that belong to it, and how near they are"], rows)
    note = f'<p class="note">Two latents match at a {MEASURES[pair["match"]]} of {pair["level"]:g} or more.</p>'
    return note + table([f"latents of {small}", "number", "of those that fire"], lines) + (most if rows else "")


def _children(linked: Linked, large: str, each: Mapping[str, Any]) -> str:
    own = zip(each["children"][:CHILDREN], each["similarity"], strict=False)
    text = " ".join(f'<span class="near">{linked(large, child)} <i>{value:.2f}</i></span>' for child, value in own)
    more = len(each["children"]) - CHILDREN
    return text + (f" and {more:,} more" if more > 0 else "")


def _stitching(comparison: Comparison, pair: Figures, linked: Linked, shown: int) -> str:
    small, large, found = pair["smaller"], pair["larger"], pair["stitching"]
    if found is None:
        return f'<p class="message">Not measured: {escape(pair["not_measured"]["stitching"])}.</p>'
    lines = [
        [
            escape(words.format(small=small, large=large)), number(found["stages"][name]["fvu"], 4),
            f"{found['stages'][name]['change']:+.4f}", number(found["stages"][name]["l0"], 1),
        ]
        for name, words in STAGES.items()
    ]  # fmt: skip
    alone = found["improve_alone"]
    note = (
        f'<p class="note">{found["latents"]["novel"]:,} latents of {large} are novel, {found["latents"]["known"]:,} '
        f"belong to one of {small}. Added alone, {percent(alone['novel'])} of the novel ones and "
        f"{percent(alone['known'])} of the others lower the FVU of {small}.</p>"
    )
    own = rows_of(comparison.matches, "dictionary", large, "other", small)
    own = own.filter(pc.fill_null(own["novel"], False))
    change = own["fvu_change_alone"].to_numpy()
    rows = [
        [
            linked(large, each["latent"]), f"{each['firings']:,}", f"{each['fvu_change_alone']:+.2e}",
            number(each["r"]), number(each["nearest_cosine"]),
        ]
        for each in own.take(largest(-change, shown)).to_pylist()
    ]  # fmt: skip
    head = [f"novel latent of {large}", "firings", "FVU change alone", "best r", "best cosine"]
    most = f"<h3>The novel latents that help most</h3>{table(head, rows)}" if rows else ""
    return table(["", "FVU", "change", "L0"], lines) + note + most
