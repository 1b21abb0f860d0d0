"""The next point of a sweep: the one that would teach most, and why."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from sae_dist.sweep.law import Fit, Refusal
from sae_dist.sweep.rows import LENGTHS, N_LATENTS, SEED, K, Row, shown, training_flops, varying
from sae_dist.sweep.scaling import Law, sparsity, target

DEAREST = 4  # times the compute of the dearest point so far: what a next point may cost
ENOUGH = 0.8  # of what the most telling point would tell: a cheaper one that tells so much is preferred


@dataclass(frozen=True)
class NextPoint:
    """Values to add to the sweep, and the reason; no values where something else is to be done first."""

    overrides: dict[str, Any]
    why: str

    @property
    def keys(self) -> str:
        """As a command line has them."""
        return " ".join(f"{key}={shown(value)}" for key, value in self.overrides.items())


def next_point(rows: Sequence[Row], fitted: Sequence[Law], *, n_latents: int | None = None) -> NextPoint:
    """The point to run after these. `fitted` are their laws, `n_latents` is the size that those are continued to."""
    done = [row for row in rows if row.fvu is not None]
    waiting = sum(row.point.state in ("pending", "leased") for row in rows)
    if not done:
        what = f"{waiting} points wait for their turn" if waiting else "repeat what failed with retry=failed"
        return NextPoint({}, f"no point has figures yet: {what if rows else 'the sweep has no points'}")
    if at_edge := _at_edge(done):
        return at_edge
    found = [each for each in fitted if each.x == "n_latents"]
    sound = [each for each in found if isinstance(each.found, Fit)]
    goal = target(rows, n_latents)
    if sound and goal:
        return _most_telling(sound[0], goal)
    failed = sum(row.point.state == "failed" for row in rows)
    refusals = [each.found for each in found if isinstance(each.found, Refusal)]
    if failed or waiting:
        why = refusals[0].text if refusals else "no law can be fitted"
        first = f"the {failed} that failed (retry=failed)" if failed else f"the {waiting} that wait"
        return NextPoint({}, f"{why}; run {first} before adding others")
    return _cure(done, refusals[-1] if refusals else Refusal("points", "no point has an FVU, a size and a k"))


def _at_edge(rows: Sequence[Row]) -> NextPoint | None:
    """Where the best value of a tuned number is the last one tried, the next one beyond it."""
    for key in varying(row.point for row in rows):
        if key in (N_LATENTS, K, SEED, *LENGTHS):
            continue
        tried = [row.point.overrides.get(key) for row in rows]
        values: list[Any] = sorted({value for value in tried if _is_number(value) and value > 0})
        if len(values) < 3 or len(values) < len(set(map(shown, tried))):
            continue
        best = min(rows, key=lambda row: row.fvu or math.inf)
        value = best.point.overrides[key]
        if value in (values[0], values[-1]):
            ratio = (values[-1] / values[0]) ** (1 / (len(values) - 1))
            beyond = value * ratio if value == values[-1] else value / ratio
            beyond = round(beyond) if isinstance(value, int) else float(f"{beyond:.2g}")
            if beyond in values or beyond <= 0:
                continue
            side = "largest" if value == values[-1] else "smallest"
            why = f"the least FVU, {best.fvu:.4g}, is at the {side} {key}, {shown(value)}: the best may lie beyond"
            return NextPoint({**best.point.overrides, key: beyond}, why)
    return None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _most_telling(fitted: Law, goal: int) -> NextPoint:
    """The point whose figure would narrow the law at `goal` most, by the resampled fits; the cheapest of the best."""
    found = fitted.found
    assert isinstance(found, Fit)
    ks = sorted({float(sparsity(row) or 0) for row in fitted.rows})
    wanted = np.mean([found.sampled(goal, k) for k in ks], axis=0)
    dearest = max(_compute(float(row.n_latents or 0), float(sparsity(row) or 0)) for row in fitted.rows)
    told = {}
    for n, k in _candidates(fitted):
        if _compute(n, k) <= DEAREST * dearest:
            there = found.sampled(n, k)
            told[n, k] = float(np.cov(wanted, there)[0, 1]) ** 2 / (float(there.var()) + found.scatter**2)
    enough = ENOUGH * max(told.values())
    n, k = min((place for place in told if told[place] >= enough), key=lambda place: _compute(*place))
    before = float(wanted.var())
    narrower = 1 - math.sqrt(max(0.0, before - told[n, k]) / before) if before else 0.0
    return NextPoint(
        {**_others(fitted), **_size(fitted.rows, n, k)},
        f"it would narrow the interval of the law at {goal:,} latents by about {narrower:.0%}, for "
        f"{_compute(n, k) / dearest:.2g} times the compute of the largest point so far; none of the points and their "
        "neighbours does notably better",
    )


def _compute(n: float, k: float) -> float:
    """FLOPs up to width and tokens, which all points of a law share."""
    return training_flops(n, k, 1.0, 1.0) or 0.0


def _candidates(fitted: Law) -> Iterator[tuple[int, float]]:
    """Sizes and ks of the points, with one step beyond each end."""
    sizes, ks = (_stepped({float(v) for v in values if v}) for values in (
        [row.n_latents for row in fitted.rows], [sparsity(row) for row in fitted.rows]))  # fmt: skip
    yield from ((round(n), k) for n in sizes for k in ks)


def _stepped(values: set[float]) -> list[float]:
    """Values in order, with one smaller and one larger at their own spacing."""
    found = sorted(values)
    if len(found) == 1:
        return found
    ratio = max(1.1, (found[-1] / found[0]) ** (1 / (len(found) - 1)))
    return [max(1.0, float(round(found[0] / ratio))), *found, float(round(found[-1] * ratio))]


def _others(fitted: Law) -> dict[str, Any]:
    """The values that all points of a law share, apart from sizes and seeds."""
    first = fitted.rows[0].point.overrides
    return {key: value for key, value in first.items() if key not in (N_LATENTS, K, SEED)}


def _size(rows: Sequence[Row], n: float, k: float) -> dict[str, Any]:
    """A size as the keys of a command line; k only where it was swept or differs."""
    keys: dict[str, Any] = {N_LATENTS: round(n)}
    if any(K in row.point.overrides for row in rows):
        keys[K] = round(k)
    return keys


def _cure(rows: Sequence[Row], refused: Refusal) -> NextPoint:
    """The point that would do most about a refusal."""
    sizes = sorted({float(row.n_latents) for row in rows if row.n_latents})
    ks = sorted({float(k) for row in rows if (k := sparsity(row))})
    if not sizes or not ks:
        return NextPoint({}, f"{refused.text}; nothing can be said without n_latents and k in the summaries")
    n, k = sizes[-1], ks[len(ks) // 2]
    match refused.why:
        case "k":
            keys, cure = {N_LATENTS: round(sizes[len(sizes) // 2]), K: round(2 * ks[-1])}, "one more k"
        case "range of x" | "flat" | "uncertain":
            keys, cure = _size(rows, 4 * n, k), "a size well beyond the others"
        case "flat in k":
            keys, cure = {N_LATENTS: round(n), K: round(4 * ks[-1])}, "a k well beyond the others"
        case "grows":
            keys, cure = {}, "train the sweep longer (train.tokens or train.steps), or with another train.lr"
        case "noise" | "points":
            seeds = [seed for row in rows if _is_number(seed := row.point.overrides.get(SEED, 0))]
            keys = _size(rows, n, k) | {SEED: max(seeds, default=0) + 1}
            cure = "another seed shows how much of it is chance"
    return NextPoint(keys, f"{refused.text}: {cure}")
