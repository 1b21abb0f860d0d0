"""The page of a study: it opens from disk, has no script, and looks like the feature pages beside which it stands.

Prompts, samples and labels come from outside, so everything that goes into it is escaped.
"""

import shlex
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from sae_dist.interpret.plain_page import plain_page, write_plain_page
from sae_dist.steer.html import chips, latent, shaded, shown, table
from sae_dist.steer.source_section import source_lines, source_section
from sae_dist.steer.study import CLAMPED, DIFFERENCE, RANDOM, WITHOUT

STATIC = Path(__file__).parent / "static"
CAVEATS = (
    "One prompt and a few samples show what can happen, not how often. A strong clamp makes any model repeat itself: "
    "look at the loss, and at the other columns, whose vectors have the same norm. A prompt that asks for it, or a "
    "difference in means, often steers better than a latent (Wu et al. 2025, AxBench). A latent's label is the tokens "
    "that it fires on, which need not be what it does to the output."
)
TITLES = {
    WITHOUT: ("Without", "the model as it is"),
    CLAMPED: ("With the clamp", "the same seeds"),
    DIFFERENCE: ("Difference in means", "a vector of the same norm, between two kinds of text"),
    RANDOM: ("A random latent", "its direction, at the same norm"),
}


def write_page(out: Path, found: Mapping[str, Any]) -> None:
    """Writes `<out>/index.html` and its styles."""
    write_plain_page(out, page(found), STATIC / "steer.css")


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a terminal shows."""
    for each in found.get("clamped", ()):
        yield f"{latent(each)} is held at {_held(each)}, of {each['maximum']:.4g} at most on {found['activity']}"
    for name, one in found.get("conditions", {}).items():
        loss = "" if one["loss"] is None else f", loss on held-out text {one['loss']:.3f}"
        yield f"{TITLES[name][0]}{loss}"
        yield f"    {' '.join(one['samples'][0]['text'].split())[:100]}"
    if (own := found.get("attribution")) is not None:
        yield f"{_difference(own)} = {own['difference']:.3f}; of each latent: attribution, what ablating it takes away"
        yield from (
            f"  {latent(each):<40}{each['attribution']:+9.3f}{each['ablation']:+9.3f}" for each in own["latents"]
        )
    yield from source_lines(found)
    if (own := found.get("search")) is not None and "conditions" not in found:
        yield f"{own['significant']} of {own['tested']:,} latents tell the texts apart at a false discovery rate of 5 %"
        yield from (
            f"  {latent(each):<48} share {each['share']:6.1%}  AUC {each['auc']:.3f}  q {each['q']:.1e}"
            for each in own["latents"]
        )


def page(found: Mapping[str, Any]) -> str:
    """index.html."""
    sections = {
        "Samples": _samples(found),
        "The next token": _next(found),
        "What made the difference": _attribution(found),
        "What latents read from": source_section(found),
        "Latents that tell the texts apart": _search(found),
        "How to read this": f'<p class="prose">{CAVEATS}</p>' if "conditions" in found else "",
        "How this was made": _settings(found),
    }
    title, subtitle = _title(found)
    return plain_page(
        sections, kind="steer", kicker="Steering", title=title, subtitle=subtitle, figures=_figures(found)
    )


def _title(found: Mapping[str, Any]) -> tuple[str, str]:
    where = f"{found['model']}, {found['hook']}"
    if clamped := found.get("clamped"):
        return ", ".join(f"{latent(each)} at {_held(each)}" for each in clamped), where
    if "attribution" in found:
        return f"What makes {_difference(found['attribution'])}", where
    if "sources" in found:
        return f"What latents read: {', '.join(str(each['latent']) for each in found['sources'])}", where
    return "Latents by example", where


def _held(each: Mapping[str, Any]) -> str:
    said = each["target"]
    return f"{said} = {each['value']:.4g}" if isinstance(said, str) else f"{each['value']:.4g}"


def _difference(own: Mapping[str, Any]) -> str:
    return f"logit of {own['of'][0]!r} less " + (f"that of {own['of'][1]!r}" if len(own["of"]) > 1 else "the mean")


def _figures(found: Mapping[str, Any]) -> str:
    shown: dict[str, str] = {}
    for name, one in found.get("conditions", {}).items():
        if one["loss"] is not None:
            shown[f"loss, {name}"] = f"{one['loss']:.3f}"
    if "norm" in found:
        shown["norm of what is added"] = f"{found['norm']:.4g}"
    if (own := found.get("attribution")) is not None:
        shown["logit difference"] = f"{own['difference']:.3f}"
        if own["rank_correlation"] is not None:
            shown["rank correlation with ablation"] = f"{own['rank_correlation']:.2f}"
    if (own := found.get("search")) is not None and "conditions" not in found:
        shown |= {"latents found": f"{own['significant']:,}", "latents tested": f"{own['tested']:,}"}
        shown["documents, this kind and the other"] = f"{own['documents'][1]:,} / {own['documents'][0]:,}"
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in shown.items())


def _samples(found: Mapping[str, Any]) -> str:
    columns = []
    for name, one in found.get("conditions", {}).items():
        title, said = TITLES[name]
        if name == RANDOM:
            said = f"latent {found['random_latent']}: {said}"
        cards = "".join(
            f'<li><p class="sample"><span class="prompt">{escape(found["settings"]["prompt"])}</span>'
            f"{escape(each['text'])}</p>{_surprise(each)}</li>"
            for each in one["samples"]
        )
        kind = ' class="clamped"' if name == CLAMPED else ""
        columns.append(f'<div{kind}><h3>{title}</h3><p class="note">{escape(said)}</p><ol>{cards}</ol></div>')
    return f'<div class="samples">{"".join(columns)}</div>' if columns else ""


def _surprise(each: Mapping[str, Any]) -> str:
    if each["surprise"] is None:
        return ""
    return f'<p class="note">{each["surprise"]:.2f} nats a token to the model without a clamp</p>'


def _next(found: Mapping[str, Any]) -> str:
    columns = []
    for name, one in found.get("conditions", {}).items():
        rows = "".join(_bar(token, p, f"{p:.1%}") for token, p in one["next"])
        chosen = "".join(
            f'<li><span class="word">{shown(token)}</span>'
            f'<span class="n">{own["logit"]:.2f}, {own["probability"]:.2%}</span></li>'
            for token, own in one["logits"].items()
        )
        asked = f'<p class="note">logit, probability</p><ol class="bars asked">{chosen}</ol>' if chosen else ""
        columns.append(f'<div><h3>{TITLES[name][0]}</h3><ol class="bars">{rows}</ol>{asked}</div>')
    return (
        f'<p class="note">after the prompt, by probability</p><div class="samples">{"".join(columns)}</div>'
        if columns
        else ""
    )


def _bar(token: str, share: float, said: str) -> str:
    step = round(20 * min(1.0, share))
    return f'<li class="v{step}"><span class="word">{shown(token)}</span><span class="n">{said}</span></li>'


def _attribution(found: Mapping[str, Any]) -> str:
    own = found.get("attribution")
    if own is None:
        return ""
    largest = max((abs(x) for each in own["latents"] for x in each["by_token"]), default=0.0) or 1.0
    texts = [shaded(own["tokens"], each["by_token"], largest) for each in own["latents"]]
    rows = "".join(
        f"<tr><td>{each['latent']}</td><td>{chips(each['label'])}</td><td>{each['attribution']:+.3f}</td>"
        f'<td>{each["ablation"]:+.3f}</td><td class="text">{text}</td></tr>'
        for each, text in zip(own["latents"], texts, strict=True)
    )
    return (
        f'<p class="note">{escape(_difference(own))}, without a clamp. Attribution: activation times decoder row times '
        "gradient, summed over tokens; ablation: what is lost when the latent alone is zero. Shaded: where it comes "
        "from; the other colour lowers the difference.</p>"
        + table(("latent", "fires on", "attribution", "ablation", "in the prompt"), rows)
    )


def _search(found: Mapping[str, Any]) -> str:
    own = found.get("search")
    if own is None:
        return ""
    if not own["latents"]:
        return f'<p class="prose">None of {own["tested"]:,} latents does, at a false discovery rate of 5 %.</p>'
    rows = "".join(
        f"<tr><td>{each['latent']}</td><td>{chips(each['label'])}</td><td>{each['share']:.1%}</td>"
        f"<td>{each['auc']:.3f}</td><td>{each['q']:.1e}</td>"
        f"<td>{each['toward']:.3g}</td><td>{each['away']:.3g}</td></tr>"
        for each in own["latents"]
    )
    return (
        '<p class="note">Share: of the difference in means of the activations, what this latent alone carries; all '
        "shares sum to about 1. AUC: how often a document of this kind has more of it than one of the other; 0.5 is "
        f"chance. q: the false discovery rate over the {own['tested']:,} latents that are ever active (Mann-Whitney, a "
        "document is one observation).</p>"
        + table(("latent", "fires on", "share", "AUC", "q", "mean here", "mean elsewhere"), rows)
    )


def _settings(found: Mapping[str, Any]) -> str:
    facts = {"activity of latents": f"on {found['activity']}", **found["settings"]}
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_value(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, [], "")
    )
    data = '<p class="note">The same as data: <a href="steer.json">steer.json</a></p>'
    return f'<div class="details"><dl>{rows}</dl></div>{data}'


def _value(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else str(value)
