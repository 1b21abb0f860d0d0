"""The page of the repeated paper: its figures, and what the paper says of each."""

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from sae_dist.comparison.html import number, percent, table
from sae_dist.interpret.plain_page import plain_page, write_plain_page

WIDTH, HEIGHT, LEFT, BELOW = 640, 220, 40, 34  # of the chart of completeness
Figures = Mapping[str, Any]


def write(out: Path, found: Figures) -> None:
    write_plain_page(out, page(found), Path(__file__).parents[1] / "paper.css")


def page(found: Figures) -> str:
    own = found["completeness"]["relu_norm"]
    law = _exponent(found)
    attribution = found["attribution"]["attribution"]
    shown = [
        ("exponent of compute", law and f"{law['value']:.3f} [{law['low']:.3f}, {law['high']:.3f}]" or "no law"),
        ("middles of completeness apart", percent(own["spread"])),
        ("attribution and ablation", f"r = {attribution['mean']:.2f} ± {attribution['half']:.2f}"),
    ]
    return plain_page(
        {
            "Sizes": _sizes(found), "Loss and compute": _laws(found), "Completeness": _completeness(found),
            "Attribution and ablation": _attribution(found), "Where this differs from the paper": _differences(),
        },
        kind="paper", kicker="Scaling Monosemanticity (Templeton et al. 2024), repeated",
        title=f"{found['model'].rpartition('/')[2]}, {found['hook']}",
        subtitle=f"{', '.join(f'{width:,}' for width in found['size']['widths'])} latents, "
        f"{found['size']['train_tokens'][-1]:,} tokens each",
        figures="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown),
    )  # fmt: skip


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _exponent(found: Figures) -> Figures | None:
    return next((line for line in found["laws"] if line["law"] == "L(C)" and line["parameter"] == "beta_x"), None)


def _sizes(found: Figures) -> str:
    lines = [
        [
            each["recipe"], f"{each['width']:,}", f"{each['tokens']:,}", number(each["l0"], 1), number(each["fvu"]),
            percent(each["loss_recovered"]), percent(each["dead_fraction"]),
        ]
        for each in found["dictionaries"]
    ]  # fmt: skip
    return table(("recipe", "latents", "tokens", "L0", "FVU", "loss recovered", "dead"), lines) + _note(
        "The paper: about 2, 35 and 65 % dead of 1, 4 and 34 million latents, fewer than 300 active on a token, 65 % "
        "of the variance explained or more."
    )


def _laws(found: Figures) -> str:
    lines = [
        [
            escape(line["law"]),
            escape(str(line["parameter"])),
            *(number(line[name]) for name in ("value", "low", "high")),
        ]
        if not line["refused"]
        else [escape(line["law"]), f"refused: {escape(line['refused'])}", "–", "–", "–"]
        for line in found["laws"]
    ]
    return table(("law", "", "value", "from", "to"), lines) + _note(
        'The <a href="../relu_norm/report/index.html">report of the sweep</a> shows the points, the forms and the '
        "residuals. The paper says that the loss falls as a power of compute, and gives no exponent."
    )


def _completeness(found: Figures) -> str:
    parts = []
    for recipe, own in found["completeness"].items():
        lines = []
        for width, each in own["widths"].items():
            curve, alive = each["curve"], each["alive"]
            times = [number(curve[name] * alive, 2) for name in ("middle", "low", "high")] if curve else ["–"] * 3
            lines.append([f"{int(width):,}", f"{alive:,}", f"{each['has']:,} of {each['concepts']:,}", *times])
        head = ("latents", "alive", "tokens with a latent", "middle × alive", "from", "to")
        apart = f"Middles times alive latents are {percent(own['spread'])} apart." if own["spread"] is not None else ""
        parts.append(f"<h3>{escape(recipe)}</h3>{_chart(own['widths'])}{table(head, lines)}{_note(apart)}")
    return "".join(parts) + _note(
        "A token has a latent if one of them is active on it and on little else (F1 of 0.5 or more). "
        "The curve of each size is fitted to tokens of known frequency; its middle is the frequency at "
        "which every second token has a latent. The paper: slightly below 1 / (alive latents) for all sizes."
    )


def _chart(widths: Figures) -> str:
    """Shares of tokens that have a latent, against frequency times alive latents."""
    points = {width: [(f * own["alive"], share) for f, share, _ in own["bins"]] for width, own in widths.items()}
    every = [x for own in points.values() for x, _ in own]
    low, high = math.log10(min(every)), math.log10(max(every))

    def place(x: float, share: float) -> str:
        across = (math.log10(x) - low) / max(high - low, 1e-9)
        return f"{LEFT + (WIDTH - LEFT - 12) * across:.1f},{8 + (HEIGHT - 16) * (1 - share):.1f}"

    lines = "".join(
        f'<polyline class="size{at}" points="{" ".join(place(*point) for point in own)}"/>'
        for at, own in enumerate(points.values())
    )
    marks = "".join(
        f'<text x="{place(x, 0).partition(",")[0]}" y="{HEIGHT + 14}" text-anchor="middle">{x:g}</text>'
        for x in (10.0**power for power in range(math.ceil(low), math.floor(high) + 1))
    )
    shares = "".join(
        f'<text x="{LEFT - 8}" y="{12 + (HEIGHT - 16) * (1 - share):.1f}" text-anchor="end">{share:g}</text>'
        for share in (0, 0.5, 1)
    )
    key = "".join(f'<span class="size{at}">{int(width):,}</span> ' for at, width in enumerate(points))
    axis = f'<text x="{WIDTH}" y="{HEIGHT + 30}" text-anchor="end">frequency × alive latents</text>'
    return (
        f'<p class="key">{key}</p><div class="wide"><svg viewBox="0 0 {WIDTH} {HEIGHT + BELOW}" role="img">'
        f"{lines}{marks}{shares}{axis}</svg></div>"
    )


def _attribution(found: Figures) -> str:
    own = found["attribution"]
    lines = [
        [name, number(own[key]["mean"], 2), number(own[key]["half"], 2), paper]
        for name, key, paper in (
            ("activation × decoder · gradient", "attribution", "0.8"), ("activation alone", "activation", "0.12"),
        )
    ]  # fmt: skip
    return table(("estimate", "r", "±", "the paper"), lines) + _note(
        f"Spearman's r with what the difference of the model's first two choices loses when a latent is zero, over "
        f"{own['latents']} active latents of a sequence drawn by chance, the mean of {own['attribution']['sequences']} "
        "sequences. The paper correlates values, of prompts of its own."
    )


def _differences() -> str:
    return "".join(
        f'<p class="prose">{text}</p>'
        for text in (
            "The model has 135 million parameters and the text is small; the paper's sizes are far larger.",
            "A concept is a token here, told by its own number, so that nobody judges whether a latent means it. "
            "The paper asks of cities, elements, animals and foods, by hand and with prompts. Tokens are easier: they "
            "are in the residual stream from the first layer on.",
            "Steering has a study of its own (docs/steering.md). A search for features that matter for safety is "
            "left to `sae-dist steer RUN toward=... away=...`: a latent that tells two texts apart is no "
            "evidence that the model uses it, and a probe of the same rows belongs beside it.",
        )
    )
