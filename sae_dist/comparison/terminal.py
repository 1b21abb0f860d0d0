"""What a terminal shows of a comparison."""

from collections.abc import Iterator

from sae_dist.comparison.figures import Figures
from sae_dist.comparison.html import KINDS, MEASURES, against, percent


def lines(figures: Figures) -> Iterator[str]:
    """What a terminal shows."""
    for each in figures["dictionaries"]:
        what = "neurons" if each["variant"] == "neurons" else "latents"
        yield (
            f"{each['name']}: {each['where']}, {each['n_latents']:,} {what}, of which {each['never_fire']:,} never "
            f"fire on {figures['rows']:,} held-out rows"
        )
    if "coactivation" in figures:
        found = figures["coactivation"]["correlation"]
        yield f"strongest partner of a latent: median r {against(found)}"
    for pair in figures.get("pairs", ()):
        for own in pair["matches"]:
            for measure in filter(own.__contains__, MEASURES):
                matched = {name: percent(each["latents"]) for name, each in own[measure]["matched"].items()}
                yield (
                    f"{own['of']} in {own['in']}: best {MEASURES[measure]}, median {against(own[measure])}; "
                    f"{pair['level']:g} or more {matched['found']} (by chance {matched['chance']})"
                )
        yield _split_line(pair)
        if (found := pair["virtual_weights"]) is not None and found["carried"]["quantiles"] is not None:
            yield _stream_line(found)
        if (stitched := pair["stitching"]) is not None:
            stages = stitched["stages"]
            yield (
                f"FVU {stages['smaller']['fvu']:.4f} of {pair['smaller']}, {stages['novel_added']['fvu']:.4f} with the "
                f"novel latents of {pair['larger']} (drawn by chance {stages['chance_added']['fvu']:.4f}), "
                f"{stages['larger']['fvu']:.4f} of {pair['larger']}"
            )


def _split_line(pair: Figures) -> str:
    counts = ", ".join(f"{pair['splitting'][kind]:,} {words}" for kind, words in KINDS.items())
    return f"of {pair['smaller']}: {counts}; of {pair['larger']}: {pair['splitting']['novel']:,} novel"


def _stream_line(found: Figures) -> str:
    carried, latents = (percent(found[name]["quantiles"]["0.5"]) for name in ("carried", "by_latents"))
    foremost, chance = (percent(found["foremost"][name]["quantiles"]["0.5"]) for name in ("found", "chance"))
    return (
        f"of what raises a latent of {found['later']}, in the median {carried} is in the stream at {found['earlier']}, "
        f"{latents} is supplied by latents of {found['earlier']}, {foremost} by the foremost (by chance {chance})"
    )
