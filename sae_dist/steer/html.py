"""Pieces of the page of a study. What comes from outside is escaped here; cells of a table are HTML already."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def latent(each: Mapping[str, Any]) -> str:
    return f"Latent {each['latent']}" + (f" ({each['label']})" if each["label"] else "")


def chips(label: str | None) -> str:
    return "".join(f'<span class="chip">{escape(word)}</span>' for word in (label or "").split(" ") if word)


def shown(token: str) -> str:
    return escape(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣", 1) if token[:1] in " \n\t" else token)


def shaded(tokens: Sequence[str], effects: Sequence[float], largest: float) -> str:
    steps = [("for" if effect > 0 else "against") + str(min(9, round(9 * abs(effect) / largest))) for effect in effects]
    return "".join(f'<span class="{step}">{escape(token)}</span>' for step, token in zip(steps, tokens, strict=True))


def table(head: Sequence[str], rows: str) -> str:
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'
