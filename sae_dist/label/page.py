"""The page of labels: it opens from disk, and looks like the feature pages, to which it links.

Labels come from outside: they are escaped here, and in the page they only ever become text nodes.
"""

import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa

from sae_dist.interpret import site
from sae_dist.interpret.read_labels import KINDS
from sae_dist.label.evidence import chance_of
from sae_dist.run_files import write_whole

STATIC = Path(__file__).parent / "static"
FROM_PAGES = ("site.css", "data.js", "elements.js", "plots.js")
BINS = 20  # of the plots
LISTED = 20_000  # latents; with more, a sample by chance
ABOUT = {
    "offline": (
        "The offline labeller knows no meanings. It states a rule about the token, the text right before it and the "
        "kind of document, which tells contexts of the latent from contexts of others best; its judge applies what "
        "the label states, and no more."
    ),
    "server": "A language model behind a server wrote the labels, and judged them without being told the answers.",
    "model": (
        "A local language model wrote the labels, and judged them without being told the answers. A small one does "
        "neither well."
    ),
}
MEANING = (
    "Detection: a passage of text is cut after a token; by the label, does the latent fire on that token? Half of the "
    "passages are held-out ones of the latent, half are of other latents, from the same categories of text, or from "
    "others where the latent fires on more than a tenth of a category. Fuzzing: in a held-out passage, "
    "tokens are marked; are they those on which the latent fires, or others? Figures are balanced accuracies: 0.5 is "
    "chance, 1 is all right. The control gives each latent the label of another one. Intervals of means are over "
    "latents, those of a latent over its passages (95 %). The labeller has seen neither the held-out passages "
    "nor their documents among the contexts of that latent. Passages of others may hold a token on which the "
    "latent fires, too, which is not known; that makes detection look worse for latents that fire often."
)


def write_page(folder: Path, table: pa.Table, scores: Mapping[str, Any], *, run: Path) -> None:
    """Writes index.html, its styles, scripts and data into `folder`, which lies in the run's folder."""
    for name in FROM_PAGES:
        shutil.copyfile(site.STATIC / name, folder / name)
    for name in ("label.css", "label.js"):
        shutil.copyfile(STATIC / name, folder / name)
    (folder / "data").mkdir(exist_ok=True)
    site.write(folder, "labels", _columns(table, _paged(run / "pages")))
    site.write(folder, "scores", {kind: _histograms(table, kind) for kind in KINDS})
    write_whole(folder / "index.html", page(scores, name=run.resolve().name))


def page(scores: Mapping[str, Any], *, name: str) -> str:
    """index.html."""
    said = "".join(f'<p class="message">{escape(scores[kind]["said"])}</p>' for kind in KINDS)
    rows = "".join(_row(kind, scores[kind]) for kind in KINDS)
    missing = "".join(_missing(kind, scores[kind]) for kind in KINDS)
    by, keys = scores["config"]["by"], scores["config"].items()
    settings = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in keys)
    shell = Template((STATIC / "label.html").read_text(encoding="utf-8"))
    return shell.substitute(
        title=escape(name), figures=_figures(scores), said=said, rows=rows, missing=missing, about=ABOUT[by],
        meaning=MEANING, settings=settings,
        subtitle=escape(f"{scores['labelled']:,} of {scores['latents']:,} latents have a label, by {scores['by']}"),
        listed=f", a sample of {LISTED:,} by chance" if scores["latents"] > LISTED else "",
    )  # fmt: skip


def _figures(scores: Mapping[str, Any]) -> str:
    shown = {
        f"{kind}{'' if which == 'label' else ', label of another latent'}": scores[kind][which]["value"]
        for kind in KINDS for which in ("label", "shuffled")
    }  # fmt: skip
    return "".join(f"<div><dt>{name}</dt><dd>{_number(value)}</dd></div>" for name, value in shown.items())


def _row(kind: str, own: Mapping[str, Any]) -> str:
    cells = "".join(f"<td>{_interval(own[which])}</td>" for which in ("label", "shuffled", "gain"))
    return f"<tr><th>{kind}</th>{cells}<td>{own['chance']}</td><td>{own['label']['latents']:,}</td></tr>"


def _interval(mean: Mapping[str, Any]) -> str:
    if mean["low"] is None:
        return _number(mean["value"])
    return f'{_number(mean["value"])} <span class="quiet">{mean["low"]:.3f} to {mean["high"]:.3f}</span>'


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _missing(kind: str, own: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{n:,} ({escape(why)})" for why, n in own["not_scored"].items())
    return f'<p class="note">No {kind} score: {reasons}.</p>' if reasons else ""


def _paged(pages: Path) -> set[int]:
    """The latents that have a feature page."""
    if not (pages / "index.html").is_file():
        return set()
    index = site.read(pages, "index")
    return set(range(len(index["count"])) if index["paged"] is None else index["paged"])


def _columns(table: pa.Table, paged: set[int]) -> dict[str, Any]:
    """What the list shows, column by column."""
    if len(table) > LISTED:
        table = table.take(sorted(chance_of(0, "listed").sample(range(len(table)), LISTED)))
    latents: Sequence[int] = table["latent"].to_pylist()
    scores = {kind: [None if value is None else round(value, 3) for value in table[kind].to_pylist()] for kind in KINDS}
    has_page = [latent in paged for latent in latents]
    return {"latent": latents, "label": table["label"].to_pylist(), "paged": has_page, **scores}


def _histograms(table: pa.Table, kind: str) -> dict[str, list[int]]:
    """How many latents have a score in each of BINS equal parts of 0 to 1: of their labels, and of others'."""
    found = {}
    for name, column in (("label", kind), ("shuffled", f"{kind}_shuffled")):
        values = table[column].drop_null().to_numpy()
        found[name] = np.histogram(values, BINS, (0.0, 1.0))[0].tolist()
    return found
