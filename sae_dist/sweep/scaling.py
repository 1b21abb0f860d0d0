"""The scaling laws of a sweep: which of its points each is fitted to, and what it says of a size not trained yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from sae_dist.sweep import law
from sae_dist.sweep.law import Fit, Interval, Refusal
from sae_dist.sweep.rows import LENGTHS, Row, label, other_keys

LEAST = 3  # points of one value of all other keys, or no law is tried
SAME = 1.01  # tokens of two points that differ less were trained equally long
BEYOND = 4  # times the largest size: where laws are continued to unless a size is stated


@dataclass(frozen=True)
class Law:
    """A law, or why there is none, of the points with one value of all keys that are not sizes, seeds or lengths."""

    name: Literal["L(n, k)", "L(n)", "L(C)"]
    group: str  # those values as a command line has them, "" where no such key varies
    rows: tuple[Row, ...]
    found: Fit | Refusal
    notes: tuple[str, ...] = ()

    @property
    def x(self) -> Literal["n_latents", "flops"]:
        return "flops" if self.name == "L(C)" else "n_latents"


class Prediction(NamedTuple):
    """FVU of a size that was not trained."""

    n_latents: int
    k: float
    fvu: Interval
    beyond: float  # times the largest size that was trained


def sparsity(row: Row) -> float | None:
    """Active latents a token: those asked for, or those measured where a kind asks for none."""
    return row.k if row.k else row.l0 or None


def laws(rows: Sequence[Row]) -> list[Law]:
    """Of every group that has points with an FVU: error by size and k, and by compute."""
    usable = [row for row in rows if row.n_latents and sparsity(row) and row.fvu and row.fvu > 0]
    keys = other_keys(usable, but=LENGTHS)
    groups: dict[str, list[Row]] = {}
    for row in usable:
        groups.setdefault(label(row, keys), []).append(row)
    small = [group for group, members in groups.items() if group and len(members) < LEAST]
    found = [
        one
        for group, members in groups.items()
        if group not in small
        for one in (*_by_size(group, members), _by_compute(group, members))
    ]
    few = f"of {len(small)} values of {', '.join(keys)} there are fewer than {LEAST} points each"
    return [*found, Law("L(n, k)", "", (), Refusal("points", few))] if small else found


def predictions(fitted: Law, n_latents: int) -> list[Prediction]:
    """What a law of size says of `n_latents`, at every k of its points."""
    if isinstance(fitted.found, Refusal) or fitted.x != "n_latents":
        return []
    largest = max(_x(row, "n_latents") for row in fitted.rows)
    values = sorted({_k(row) for row in fitted.rows})
    return [Prediction(n_latents, k, fitted.found.at(n_latents, k), n_latents / largest) for k in values]


def target(rows: Sequence[Row], stated: int | None) -> int | None:
    """The size to continue to: as stated, else a few times the largest one; None where no size is known."""
    sizes = [row.n_latents for row in rows if row.n_latents]
    return stated or (round(BEYOND * max(sizes)) if sizes else None)


def _by_size(group: str, rows: list[Row]) -> list[Law]:
    """Of the points that trained longest. Without three values of k it is not the joint law, but that of n alone."""
    longest = max((row.tokens for row in rows if row.tokens), default=None)
    chosen = tuple(row for row in rows if longest is None or row.tokens is None or row.tokens * SAME >= longest)
    notes = [f"{len(rows) - len(chosen)} points that saw fewer tokens are left out"] if len(chosen) < len(rows) else []
    if longest:
        notes.append(f"at {longest:,.0f} tokens a point, not at convergence")
    values = sorted({_k(row) for row in chosen})
    if len(values) >= 3:
        return [Law("L(n, k)", group, chosen, _fit(chosen, "n_latents"), tuple(notes))]
    few = f"k has {len(values)} different {'value' if len(values) == 1 else 'values'}, and the joint law needs three"
    return [
        Law("L(n, k)", group, chosen, Refusal("k", few)),
        Law("L(n)", group, chosen, _fit(chosen, "n_latents"), tuple(notes)),
    ]


def _by_compute(group: str, rows: list[Row]) -> Law:
    """Where points of one size trained for different lengths, of those that no cheaper one of the same k beats."""
    known = tuple(row for row in rows if row.flops)
    if not known:
        return Law("L(C)", group, (), Refusal("points", "no summary has both d_model and tokens_trained"))
    tokens = [row.tokens for row in known if row.tokens]
    if max(tokens) <= SAME * min(tokens):
        note = "all points saw as many tokens, so compute differs by size alone"
        return Law("L(C)", group, known, _fit(known, "flops"), (note,))
    best = tuple(row for row in known if not any(_beats(other, row) for other in known))
    found = law.no_trend(*_arrays(known, "flops")) or _fit(best, "flops")
    return Law("L(C)", group, best, found, ("of the points that no cheaper one of the same k beats",))


def _beats(one: Row, other: Row) -> bool:
    cheaper = _x(one, "flops") < _x(other, "flops")
    return _k(one) == _k(other) and cheaper and _fvu(one) <= _fvu(other)


def _fit(rows: Sequence[Row], x: str) -> Fit | Refusal:
    return law.fit(*_arrays(rows, x))


def _arrays(rows: Sequence[Row], x: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = zip(*((_x(row, x), _k(row), _fvu(row)) for row in rows), strict=True)
    sizes, ks, losses = (np.array(column, dtype=float) for column in columns)
    return sizes, ks, losses


def _x(row: Row, x: str) -> float:
    return float(row.get(x))


def _k(row: Row) -> float:
    return float(sparsity(row) or math.nan)


def _fvu(row: Row) -> float:
    return float(row.fvu or math.nan)
