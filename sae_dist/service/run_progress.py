"""How far a run is: a part for every phase that can be counted, with its present speed and the time that is left."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sae_dist.service.run_status import RunStatus, rate
from sae_dist.train.members import MAIN, split_name

FIGURES = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_fraction": "dead",
    "lr": "lr",
}  # of a line of training, and how they are shown


class Progress(NamedTuple):
    """`done` of `of` units, steps or tokens; the last two None where there is nothing to tell them from."""

    name: str
    done: int
    of: int
    unit: str
    tokens_per_second: float | None = None
    eta_s: float | None = None

    @property
    def share(self) -> float:
        return min(self.done / self.of, 1.0) if self.of else 0.0


def progress(run: RunStatus) -> list[Progress]:
    """Every phase that has begun."""
    found = [part for part in (_text(run), _harvest(run)) if part is not None]
    waits_s = max((part.eta_s or 0.0 for part in found), default=0.0)  # rows that are still to come
    if (train := _train(run, waits_s)) is not None:
        found.append(train)
    return [*found, *_judging(run)]


def figures(run: RunStatus) -> dict[str, dict[str, float]]:
    """What the newest line of training says of every dictionary, by its name."""
    newest = run.training[-1] if run.training else {}
    names = dict.fromkeys(split_name(key)[0] for key in newest if split_name(key)[1] in FIGURES)
    found = {
        prefix.rstrip("/") or MAIN: {figure: newest[prefix + figure] for figure in FIGURES if prefix + figure in newest}
        for prefix in names
    }
    return {name: {k: v for k, v in own.items() if isinstance(v, int | float)} for name, own in found.items()}


def _text(run: RunStatus) -> Progress | None:
    facts = run.said.get("text", {})
    if run.phase != "preparing" or not _count(facts, "of"):
        return None
    return Progress("text", _count(facts, "tokens"), _count(facts, "of"), "tokens")


def _harvest(run: RunStatus) -> Progress | None:
    facts = run.said.get("harvest") or (run.harvest[-1] if run.harvest else {})
    done, of = _count(facts, "units"), _count(facts, "of")
    if not of:
        return None
    going = run.works and done < of
    eta_s, per_second = (run.harvest[-1] if run.harvest else {}).get("eta_s"), facts.get("tokens_per_second")
    if isinstance(eta_s, int | float):
        eta_s = max(eta_s - (run.now - run.harvest[-1].get("time", run.now)), 0.0)
    return Progress("harvest", done, of, "units", per_second if going else None, eta_s if going else None)


def _train(run: RunStatus, waits_s: float) -> Progress | None:
    steps = run.steps
    if not steps or not (run.training or "train" in run.said):
        return None
    going = run.works and run.step < steps
    steps_per_second, newest = rate(run.training, "step"), run.training[-1] if run.training else {}
    eta_s = max((steps - run.step) / steps_per_second, waits_s) if steps_per_second else None
    per_second = rate(run.training, "tokens") or newest.get("tokens_per_second")
    return Progress("train", run.step, steps, "steps", per_second if going else None, eta_s if going else None)


def _judging(run: RunStatus) -> Iterator[Progress]:
    facts = run.said.get("progress", {})
    if run.phase in ("evaluating", "writing pages") and (of := _count(facts, "of")):
        name, key = ("evaluate", "ce_tokens") if run.phase == "evaluating" else ("pages", "unit")
        yield Progress(name, _count(facts, key), of, "tokens" if name == "evaluate" else "units")


def _count(facts: Mapping[str, Any], key: str) -> int:
    value = facts.get(key)
    return value if isinstance(value, int) else 0
