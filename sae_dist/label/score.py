"""How good labels are: detection and fuzzing on held-out contexts, beside the label of another latent and chance.

Detection: does the latent fire on the last token of a passage? Those of the latent against those of other latents, of
the same categories. A passage ends there, since what stands after a token cannot make a latent fire on it.
Fuzzing: are the marked tokens those on which it fires, or others of the same passage?
"""

import math
import random
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from sae_dist.label import students_t
from sae_dist.label.evidence import Evidence, Passage, chance_of
from sae_dist.label.interface import DETECTION, FUZZING, Item

CHANCE = 0.5  # what a judge gets that answers all items alike, or by a coin
FEW = 10  # latents: with fewer the page draws no conclusion
NO_OTHERS, NO_CONTEXTS, NO_LABEL, UNREAD = "fires too often", "too few contexts", "no label", "answer not understood"


class Trial(NamedTuple):
    """Items with what is right of each; `why` says why there are none."""

    items: Sequence[Item]
    truth: Sequence[bool]
    why: str = ""


class Score(NamedTuple):
    """Balanced accuracy of one label: the mean of the shares of positives and of negatives that are right."""

    value: float
    low: float  # 95 % interval
    high: float


class Mean(NamedTuple):
    """Over latents, with a 95 % interval by Student's t, which takes two latents at least."""

    value: float | None
    low: float | None
    high: float | None
    latents: int


def trial(kind: str, evidence: Evidence, *, seed: int) -> Trial:
    """What the judge is asked of a latent's label."""
    return {DETECTION: detection, FUZZING: fuzzing}[kind](evidence, chance_of(seed, f"{kind} {evidence.latent}"))


def detection(evidence: Evidence, chance: random.Random) -> Trial:
    """The latent's held-out passages against those of others."""
    if not evidence.held:
        return Trial((), (), NO_CONTEXTS)
    if not evidence.held_others:
        return Trial((), (), NO_OTHERS)
    sides = ((True, evidence.held), (False, evidence.held_others))
    return _mixed([(Item(p, (p.at,)), truth) for truth, part in sides for p in part], chance)


def fuzzing(evidence: Evidence, chance: random.Random) -> Trial:
    """Half of the held-out passages with the tokens marked on which it fires, half with as many others."""
    usable = [p for p in evidence.held if 2 * len(p.active) <= len(p.pieces)]
    if len(usable) < 2:
        return Trial((), (), NO_OTHERS if len(evidence.held) > 1 else NO_CONTEXTS)
    usable = usable[: len(usable) // 2 * 2]
    right = set(chance.sample(range(len(usable)), len(usable) // 2))
    both = [(Item(p, p.active if i in right else _silent(p, chance)), i in right) for i, p in enumerate(usable)]
    return _mixed(both, chance)


def _silent(passage: Passage, chance: random.Random) -> tuple[int, ...]:
    """As many places as it is active at, on which it is not."""
    silent = sorted(set(range(len(passage.pieces))) - set(passage.active))
    return tuple(sorted(chance.sample(silent, len(passage.active))))


def _mixed(both: Sequence[tuple[Item, bool]], chance: random.Random) -> Trial:
    mixed = chance.sample(both, len(both))
    return Trial([item for item, _ in mixed], [truth for _, truth in mixed])


def score(trial: Trial, answers: Sequence[bool]) -> Score:
    """The interval is Agresti and Caffo's, for the difference of two shares: it holds for few items, too."""
    hits = [answer for answer, truth in zip(answers, trial.truth, strict=True) if truth]
    alarms = [answer for answer, truth in zip(answers, trial.truth, strict=True) if not truth]
    value = (1 + fmean(hits) - fmean(alarms)) / 2
    p, q = ((sum(each) + 1) / (len(each) + 2) for each in (hits, alarms))
    middle = (1 + p - q) / 2
    half = students_t.NORMAL / 2 * math.sqrt(p * (1 - p) / (len(hits) + 2) + q * (1 - q) / (len(alarms) + 2))
    return Score(value, max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half)))


def mean(values: Sequence[float]) -> Mean:
    n = len(values)
    if n < 2:
        return Mean(values[0] if values else None, None, None, n)
    middle, half = fmean(values), students_t.quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Mean(middle, middle - half, middle + half, n)


def summary(own: Sequence[float], pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Of one kind of score: that of the labels, and (label, label of another latent) of each latent that has both."""
    found = {"label": mean(own), "shuffled": mean([b for _, b in pairs]), "gain": mean([a - b for a, b in pairs])}
    beats = {
        "chance": _above(found["label"], CHANCE),
        "shuffled": _above(found["gain"], 0.0),
    }
    return {name: each._asdict() for name, each in found.items()} | {"chance": CHANCE, "beats": beats}


def _above(found: Mean, level: float) -> bool | None:
    """Whether the whole interval lies above it; None for too few latents."""
    return None if found.low is None or found.latents < FEW else found.low > level


def verdict(kind: str, own: Mapping[str, Any]) -> str:
    """What a score says, in a sentence."""
    chance, shuffled = own["beats"]["chance"], own["beats"]["shuffled"]
    head = {DETECTION: "where a latent fires", FUZZING: "on which tokens of a passage it fires"}[kind]
    if chance is None or shuffled is None:
        n = own["gain"]["latents"]
        return f"Whether these labels say {head} cannot be told from {n} scored latents; {FEW} are needed."
    if chance and shuffled:
        return (
            f"These labels say {head} better than chance, and better than labels of other latents (by "
            f"{own['gain']['value']:.3f}, 95 % interval {own['gain']['low']:.3f} to {own['gain']['high']:.3f})."
        )
    missed = " or ".join(
        name for beats, name in ((chance, "chance"), (shuffled, "labels of other latents")) if not beats
    )
    return f"These labels do not say {head} better than {missed}. Do not rely on them."
