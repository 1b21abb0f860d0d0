"""The page of the repeated paper: every figure beside the paper's own."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.paper_2023.proxies import ALPHABETS
from sae_dist.comparison.html import number, percent, table
from sae_dist.comparison.plots import histogram
from sae_dist.interpret.plain_page import plain_page, write_plain_page

PAPER_R = {"arabic": 0.74, "dna": 0.80, "base64": 0.38, "hebrew": 0.55}
PAPER_NEURON = {"base64": 0.18, "hebrew": 0.10}
PAPER_ALIKE = {"arabic": 0.91, "dna": 0.92, "base64": 0.85, "hebrew": 0.92}
RECIPES = {"paper": "the paper's", "modern": "BatchTopK"}
WIDTH, LINE, LEFT = 640, 26, 110  # of the chart of features
Figures = Mapping[str, Any]


def write(out: Path, found: Figures) -> None:
    write_plain_page(out, page(found), Path(__file__).parents[1] / "paper.css")


def page(found: Figures) -> str:
    size = found["size"]
    main = next(each for each in found["dictionaries"] if each["width"] == size["main"])
    universal = found["universality"]
    shown = [
        ("transformer, nats a token", number(found["transformers"]["A"]["heldout_loss"], 2)),
        (f"loss recovered, {size['main']:,} latents", percent(main["loss_recovered"])),
        ("features above the best neuron by 0.2", _ahead(found)),
        ("median r, A to B", f"{number(universal['paper']['median'], 2)} (neurons {number(universal['neurons'], 2)})"),
    ]
    return plain_page(
        {
            "Dictionaries": _dictionaries(found), "Features and neurons": _features(found),
            "Splitting": _splitting(found), "Universality": _universality(found), "Automata": _automata(found),
            "Where this differs from the paper": _differences(found),
        },
        kind="paper", kicker="Towards Monosemanticity (Bricken et al. 2023), repeated", title="One layer, taken apart",
        subtitle=f"{size['lm_tokens']:,} tokens for each transformer, {size['train_tokens']:,} for each dictionary, "
        f"{main['rows']:,} held-out rows",
        figures="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown),
    )  # fmt: skip


def _ahead(found: Figures) -> str:
    lines = [line for line in found["features"] if line["modern A"][1] >= 0.5]
    return f"{sum(line['modern A'][1] - line['neuron'][1] >= 0.2 for line in lines)} of {len(found['features'])}"


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _dictionaries(found: Figures) -> str:
    head = (
        "transformer",
        "recipe",
        "latents",
        "L0",
        "FVU",
        "loss recovered, zero",
        "mean",
        "silent",
        "on fewer than 10 rows",
    )

    def recovered(each: Figures) -> list[str]:
        """Of the shuffled transformer none: it predicts nothing."""
        shown = each["transformer"] != "shuffled"
        return [percent(each[name] if shown else None) for name in ("loss_recovered", "loss_recovered_mean")]

    lines = [
        [
            each["transformer"], RECIPES[each["recipe"]], f"{each['width']:,}", number(each["l0"], 1),
            number(each["fvu"]), *recovered(each), percent(each["silent"]), percent(each["ultralow"]),
        ]
        for each in found["dictionaries"]
    ]  # fmt: skip
    return table(head, lines) + _note(
        "The paper: 79 % of the loss recovered by 4,096 latents and 94.5 % by 131,072, both beside zero ablation, "
        "which it calls a particularly bad baseline; of 4,096 latents 4.1 % silent on 10<sup>8</sup> tokens and 7.1 % "
        "active on fewer than one in a million; fewer than 10 to 20 latents active on a token. <i>shuffled</i> is A "
        "with the weights of each matrix permuted."
    )


def _features(found: Figures) -> str:
    head = ("proxy", "latent", "r", "BatchTopK", "neuron", "r", "B", "shuffled", "the paper")
    lines = []
    for line in found["features"]:
        name = line["proxy"]
        paper = f"{PAPER_R[name]:.2f}" if name in PAPER_R else "–"
        paper += f", neuron {PAPER_NEURON[name]:.2f}" if name in PAPER_NEURON else ""
        (latent, r), (neuron, other) = line["paper A"], line["neuron"]
        rest = [number(line[which][1]) for which in ("modern A", "paper B", "paper shuffled")]
        lines.append(
            [escape(name), f"{latent}", number(r), rest[0], f"{neuron}", number(other), rest[1], rest[2], paper]
        )
    return (
        _chart(found["features"])
        + table(head, lines)
        + _note(
            "Pearson's r of an activation with the log-likelihood ratio of a kind of text. The latent with the largest "
            "r on one half of the held-out rows is judged on the other. Of alphabets ("
            + ", ".join(ALPHABETS)
            + ") and scripts "
            "the ratio follows from the letters, of the other kinds from how often each token occurs in their "
            "documents. B and shuffled are the paper's recipe on the other transformers; each has its own best latent."
        )
    )


def _chart(features: Sequence[Figures]) -> str:
    """A line a proxy: the best latents of A and of the shuffled transformer, and the best neuron."""

    def x(r: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * min(max(r, 0.0), 1.0)

    height = LINE * len(features)
    parts = [f'<line class="ground" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="0" y2="{height}"/>' for at in (0, 0.5, 1)]
    for place, line in enumerate(features):
        y = LINE * (place + 0.5)
        best, neuron, shuffled = (line[which][1] for which in ("modern A", "neuron", "modern shuffled"))
        parts += [
            f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(line["proxy"])}</text>',
            f'<line class="span" x1="{x(neuron):.1f}" x2="{x(best):.1f}" y1="{y}" y2="{y}"/>',
            f'<circle class="latent" cx="{x(best):.1f}" cy="{y}" r="6"/>',
            f'<circle class="neuron" cx="{x(neuron):.1f}" cy="{y}" r="5"/>',
            f'<path class="shuffled" d="M{x(shuffled):.1f} {y - 7}v14"/>',
        ]
    parts += [f'<text x="{x(at):.1f}" y="{height + 15}" text-anchor="middle">{at:g}</text>' for at in (0, 0.5, 1)]
    marks = (
        '<p class="key"><span class="latent">best latent of BatchTopK</span> <span class="neuron">best neuron</span> '
        '<span class="shuffled">the same of the shuffled transformer</span></p>'
    )
    return f'{marks}<div class="wide"><svg viewBox="0 0 {WIDTH} {height + 20}" role="img">{"".join(parts)}</svg></div>'


def _splitting(found: Figures) -> str:
    counts = found["splitting"]
    categories = sorted({name for own in counts.values() for name in own if name})
    lines = [[escape(name), *(f"{own[category]:,}" for category in categories)] for name, own in counts.items()]
    return table(("dictionary", *categories), lines) + _note(
        "Latents with half of their activation or more in documents of a category, of those that are active on "
        "ten rows or more. The paper has one base64 latent of 512, three of 4,096 and more of 16,384, counted by hand."
    )


def _universality(found: Figures) -> str:
    own = found["universality"]
    charts = "".join(
        f"<figure><figcaption><b>{RECIPES[name]}</b></figcaption>"
        f"{histogram(own[name]['histogram'], own[name]['of_chance'], own[name]['median'])}</figure>"
        for name in RECIPES
    )
    lines = [[RECIPES[name], number(own[name]["median"]), number(own[name]["chance"])] for name in RECIPES] + [
        ["neurons", number(own["neurons"]), "–"]
    ]
    best = [
        [escape(name), *(number(own[recipe]["best"][name]) for recipe in RECIPES), number(PAPER_ALIKE.get(name), 2)]
        for name in own["paper"]["best"]
    ]
    return (
        f'<div class="plots">{charts}</div>' + table(("median r of A with the nearest of B", "", "by chance"), lines)
        + _note("The paper: 0.72, and 0.46 for neurons.")
        + table(("best latent for", *RECIPES.values(), "the paper"), best)
    )  # fmt: skip


def _automata(found: Figures) -> str:
    lines = [
        [
            f"{edge['from']} ({escape(edge['of'])})", f"{edge['to']} ({escape(edge['to_of'])})", percent(edge["share"]),
            percent(edge["alone"]),
        ]
        for edge in found["automata"]
    ]  # fmt: skip
    if not lines:
        return _note("No latent is followed by another in half of all cases.")
    return table(("active here", "on the next token", "how often", "by itself"), lines) + _note(
        "Of the two strongest BatchTopK latents of each proxy: pairs of which the second is active on the next token "
        "in half of all cases and four times as often as by itself. A latent that "
        "follows itself is the simplest automaton."
    )


def _differences(found: Figures) -> str:
    return "".join(
        f'<p class="prose">{text}</p>'
        for text in (
            "The paper trains its transformer on 100 billion tokens of the Pile and dictionaries on 8 billion "
            "activations; here both see a few million tokens of manuals, web pages, code, DNA and base64 from "
            "Debian packages. "
            "Kinds of text that proxies tell are far more frequent: a twelfth of the text is DNA, one part in 770 of "
            "the paper's is Arabic. A transformer has neurons for what is so frequent, and proxies that follow from "
            "single tokens are met by latents of the shuffled transformer too.",
            f"Activations have no unit, so that the paper's L1 coefficient of 0.004 cannot be taken over: "
            f"{found['l1_coefficient']:g} in the units of `sae=relu` gives the L0 above. Adam's learning rate and its "
            "decay are the defaults of this project.",
            "Silent and rare latents are counted on fewer rows than the paper's 10<sup>8</sup>, so that more of them "
            "seem silent here.",
            "Proxies of the paper are judged on all its tokens; here a negative sum counts as 0. "
            "The paper chooses a latent by hand and finds the most similar one in B; here the largest r decides.",
        )
    )
