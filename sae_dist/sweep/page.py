"""The parts of the report's page, as HTML. Whatever comes from outside goes through `escape`."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from sae_dist.sweep.law import FORMS, OPENAI, Fit, Interval, Refusal
from sae_dist.sweep.rows import Row, frontier, over_seeds, seed_spread, shown
from sae_dist.sweep.scaling import Law
from sae_dist.sweep.tables import Analysis, Table

if TYPE_CHECKING:
    from sae_dist.sweep.drawing import Plot

SYMBOLS = {"alpha": "α", "beta_k": "β_k", "gamma": "γ", "zeta": "ζ", "eta": "η"}
MEANING = (
    "FVU is the fraction of variance unexplained on held-out rows: 0 is perfect, 1 is the mean of the rows. L0 is the "
    "mean number of active latents a token. Training FLOPs are tokens × (2 d_model n_latents + 8 d_model k): one dense "
    "product that chooses the latents, and decode, d_z and both gradients over the active ones. They leave out the "
    "optimizer, AuxK and the language model. Seconds and cost of a pass over several points are divided among them by "
    "their work."
)
NUMBER = re.compile(r"[-–+0-9.,e%]*")  # a cell that stands to the right
VALUES = 8  # of a swept key that the head lists
COLUMNS = {  # of the table of points: name, and how a figure is written
    "n_latents": ("latents", ",.0f"), "k": ("k", ",.4g"), "fvu": ("FVU", ".4g"), "l0": ("L0", ".4g"),
    "loss_recovered": ("loss recovered", ".4g"), "dead_fraction": ("dead", ".2%"), "tokens": ("tokens", ",.0f"),
    "flops": ("FLOPs", ".2e"), "seconds": ("seconds", ",.1f"), "cost": ("cost", ",.4g"),
}  # fmt: skip


def subtitle(analysis: Analysis) -> str:
    """How many points there are in which state, and what was swept."""
    states = [row.point.state for row in analysis.rows]
    counts = [f"{states.count(state)} {state}" for state in ("done", "leased", "pending", "failed") if state in states]
    head = f"{len(states)} {'point' if len(states) == 1 else 'points'}" + (f": {', '.join(counts)}" if counts else "")
    return " · ".join([head, *(f"{key} {_values(analysis.rows, key)}" for key in analysis.keys)])


def _values(rows: Sequence[Row], key: str) -> str:
    found = list(dict.fromkeys(shown(row.point.overrides.get(key)) for row in rows))
    return ", ".join(found[:VALUES]) + (f" and {len(found) - VALUES} others" if len(found) > VALUES else "")


def overview(analysis: Analysis) -> str:
    """The figures that stand at the head of the page."""
    rows = analysis.rows
    best = min((row for row in rows if row.fvu is not None), key=lambda row: row.fvu or 0.0, default=None)
    recovered = max((row.loss_recovered for row in rows if row.loss_recovered is not None), default=None)
    seconds = [row.seconds for row in rows if row.seconds is not None]
    cost = [row.cost for row in rows if row.cost is not None]
    shown_figures = {
        "least FVU": best and f"{best.fvu:.4g}",
        "most loss recovered": recovered is not None and f"{recovered:.4g}",
        "training time": seconds and duration(sum(seconds)),
        "cost": cost and f"{sum(cost):,.4g}",
    }
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown_figures.items() if value)


def main(analysis: Analysis, found: Mapping[str, Table], pictures: Sequence["Plot"]) -> str:
    """All sections."""
    sections = {
        "What to run next": _next(analysis),
        "Figures": _figures(analysis, pictures),
        "Frontier": _frontier(analysis, pictures),
        "Scaling laws": "".join(_law(at, each, analysis, pictures) for at, each in enumerate(analysis.laws)),
        "Points": _points(analysis),
        "Failures": _failures(found["failures"]),
        "What the figures mean": f"<p>{MEANING}</p>",
    }
    return "\n".join(f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections.items() if content)


def _next(analysis: Analysis) -> str:
    found = analysis.next
    keys = f"<pre>{escape(found.keys)}</pre>" if found.keys else ""
    why = found.why[:1].upper() + found.why[1:]
    return f'{keys}<p class="{"" if keys else "message"}">{escape(why)}.</p>'


def _pictures(pictures: Sequence["Plot"]) -> str:
    each = (
        f'<figure><figcaption><a href="plots/{plot.name}.png">PNG</a>{escape(plot.title)}</figcaption>'
        f'<img src="plots/{plot.name}.svg" alt="{escape(plot.title)}"></figure>'
        for plot in pictures
    )
    return f'<div class="plots">{"".join(each)}</div>'


def _figures(analysis: Analysis, pictures: Sequence["Plot"]) -> str:
    headings = list(dict.fromkeys(plot.section for plot in pictures if plot.section.startswith("By ")))
    if not headings:
        return '<p class="message">No point has figures yet.</p>'
    missing = [
        COLUMNS[name][0] for name in ("l0", "loss_recovered", "dead_fraction")
        if all(row.get(name) is None for row in analysis.rows)
    ]  # fmt: skip
    note = f'<p class="note">Not measured in this sweep: {", ".join(missing)}.</p>' if missing else ""
    seeds = max(map(len, over_seeds(analysis.rows)), default=1)
    if seeds > 1:
        note += '<p class="note">Seeds of a point are one mark: their mean, with a bar from the least to the most.</p>'
    sections = {each: [plot for plot in pictures if plot.section == each] for each in headings}
    return note + "".join(f"<h3>{escape(each)}</h3>{_pictures(chosen)}" for each, chosen in sections.items())


def _frontier(analysis: Analysis, pictures: Sequence["Plot"]) -> str:
    chosen = [plot for plot in pictures if plot.section == "Frontier"]
    if not chosen:
        return ""
    best = [[escape(analysis.named(row)), f"{row.l0:.4g}", f"{row.fvu:.4g}"] for row in frontier(analysis.rows, "fvu")]
    note = '<p class="note">A point is on the frontier if no other is better in both figures.</p>'
    return note + _pictures(chosen) + _table(["on the frontier of FVU", "L0", "FVU"], best)


def _law(number: int, each: Law, analysis: Analysis, pictures: Sequence["Plot"]) -> str:
    heading = f"<h3>{escape(each.name)}{escape(f' of {each.group}') if each.group else ''}</h3>"
    notes = "".join(f'<p class="note">{escape(note[:1].upper() + note[1:])}.</p>' for note in each.notes)
    if isinstance(each.found, Refusal):
        return f'{heading}<p class="message">Not fitted: {escape(each.found.text)}.</p>{notes}'
    chosen = [plot for plot in pictures if plot.section == f"Law {number}"]
    return heading + _fitted(each, each.found, analysis) + _pictures(chosen) + notes


def _fitted(each: Law, found: Fit, analysis: Analysis) -> str:
    x = "C" if each.x == "flops" else "n"
    published = OPENAI if each.name == "L(n, k)" else {}
    lines = [
        [f"exponent of {x if name == 'x' else name} in the middle of the data", *_interval(value), ""]
        for name, value in found.exponents.items()
    ]
    lines.append(["irreducible part in the middle of the data", *_interval(found.floor), ""])
    lines += [
        [SYMBOLS.get(name, f"β_{x}"), *_interval(value), f"{published[name]:g}" if published else ""]
        for name, value in found.parameters.items()
    ]
    head = ["", "estimate", "95% interval", "GPT-4 (Gao et al. 2024)" if published else ""]
    form = FORMS[found.values_of_k].format(x=x)
    spread = seed_spread(each.rows)
    chance = "" if spread is None else f" Seeds alone scatter by {spread:.2%}."
    if spread is not None and found.scatter > 2 * spread:
        chance += " So the form misses more than chance; the intervals take it for chance."
    scatter = f'<p class="note">{len(each.rows)} points scatter by {found.scatter:.2%} about the law.{chance}</p>'
    return f"<pre>{escape(form)}</pre>{_table(head, lines)}{scatter}{_predictions(each, analysis)}"


def _predictions(each: Law, analysis: Analysis) -> str:
    found = analysis.predictions(each)
    if not found:
        return ""
    lines = [[f"{one.n_latents:,}", f"{one.k:g}", *_interval(one.fvu)] for one in found]
    beyond = found[0].beyond
    far = (
        f'<p class="note">{beyond:.3g} times the largest size that was trained. The interval covers what chance did '
        "to the fit. It does not cover that the form may not hold so far out.</p>"
    )
    table = _table(["latents", "k", "FVU", "95% interval"], lines)
    return f"<h3>Continued to {found[0].n_latents:,} latents</h3>{table}{far if beyond > 1 else ''}"


def _points(analysis: Analysis) -> str:
    shown_columns = [name for name in COLUMNS if any(row.get(name) is not None for row in analysis.rows)]
    others = [key for key in analysis.keys if key not in ("sae.n_latents", "sae.k")]
    head = ["point", *others, "state", "tries", *(COLUMNS[name][0] for name in shown_columns)]
    lines = [
        [
            f"<code>{escape(row.point.id[:12])}</code>",
            *(escape(shown(row.point.overrides.get(key))) for key in others),
            _state(row),
            str(row.point.tries),
            *(_figure(row, name) for name in shown_columns),
        ]
        for row in analysis.rows
    ]
    return _table(head, lines)


def _state(row: Row) -> str:
    return f'<span class="failed">{row.point.state}</span>' if row.point.state == "failed" else row.point.state


def _figure(row: Row, name: str) -> str:
    value = row.get(name)
    return "–" if value is None else format(value, COLUMNS[name][1])


def _failures(failed: Table) -> str:
    lines = [
        [escape(one["point"]), str(one["tries"]), escape(one["failure"] or "no reason was kept")] for one in failed
    ]
    return _table(["point", "tries", "what it said last"], lines) if lines else ""


def _interval(found: Interval) -> tuple[str, str]:
    return f"{found.value:.3g}", f"{found.low:.3g}&nbsp;to&nbsp;{found.high:.3g}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; columns of numbers stand to the right."""
    right = [all(NUMBER.fullmatch(line[at]) for line in lines) for at in range(len(head))]
    names = "".join(f"<th{' class=n' if to else ''}>{escape(name)}</th>" for name, to in zip(head, right, strict=True))
    body = "".join("<tr>" + "".join(map(_cell, line, right)) + "</tr>" for line in lines)
    return f'<div class="table"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str, right: bool) -> str:
    name = "n" if right else "text" if len(cell) > 60 else ""
    return f'<td class="{name}">{cell}</td>' if name else f"<td>{cell}</td>"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"
