"""summary.json: the final figures of a run. A figure that was not measured is null, never a guess."""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

import torch
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from sae_dist.config import UserError
from sae_dist.evaluate import twins
from sae_dist.run_files import read_json
from sae_dist.sae import dictionary
from sae_dist.sae.config import target_k
from sae_dist.sae.dictionary import WEIGHTS, check
from sae_dist.service.config import TrainJob
from sae_dist.shards.hooks import Hooks, sides
from sae_dist.shards.reader import Store, first_heldout_pairs
from sae_dist.train.members import MAIN, Member, folder, twin_name

logger = logging.getLogger(__name__)


SUMMARY_CURE = "repeat the run's command, which writes it again"
STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=2**63)]
TWIN_ROWS = 16_384  # held-out rows that say which latents of a dictionary and its twin are alive
Metrics = dict[str, int | float | str | None | dict[str, float | str | None]]  # not_measured: reasons by figure
Seconds = Annotated[float, Field(ge=0, lt=1e12)]


class AlsoJudged(TypedDict):
    """Another dictionary of the pass, in summary.json."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: str
    dictionary: str
    n_latents: Count
    k: Count | None
    eval: Metrics


class Site(TypedDict):
    """One of several hook points of a dictionary, in summary.json."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    hook: str
    width: Count


class Summary(TypedDict):
    """The keys of summary.json that every reader may rely on; there are more."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: str
    config_hash: str
    store: str
    hook: str
    sites: NotRequired[list[Site]]  # of a crosscoder, in the order of their columns
    target_hook: NotRequired[str]  # of a transcoder, and its width
    target_sites: NotRequired[list[Site]]
    d_out: NotRequired[Count]
    dictionary: str
    n_latents: Count
    d_model: Count
    k: Count | None
    tokens_trained: Count
    steps: Count
    wall_seconds: Seconds
    tokens_per_second: Seconds
    order_hash: str
    eval: Metrics
    also: NotRequired[list[AlsoJudged]]
    twins: NotRequired[dict[str, dict[str, float | dict[str, float]]]]
    alerts: NotRequired[list[str]]
    pages: NotRequired[str]
    judged: NotRequired[str]


class Finished(Protocol):
    """The result of a training, as far as a summary needs it."""

    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def order_hash(self) -> str: ...
    @property
    def seconds(self) -> float: ...


def read_finished(out: Path, hashed: str, members: Iterable[Member]) -> dict[str, Any] | None:
    """The summary of a finished run of the same configuration in `out`, if all its dictionaries are sound.

    None otherwise; what is missing or damaged is logged, and made again by the caller.
    """
    if not os.path.lexists(out / "summary.json"):
        return None
    try:
        found = read_summary(out)
        if found["config_hash"] != hashed:
            return None
        for member in members:
            check(member.folder(out))
    except UserError as damage:
        what, _, _ = str(damage).partition(";")  # without the cure, to repeat the command: that is happening
        logger.warning("this run had finished, but %s; making it again", what)
        return None
    return found


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json of a finished run, as `Summary` says; UserError when it is missing or damaged."""
    return dict(read_json(out / "summary.json", Summary, cure=SUMMARY_CURE))


class Phase(TypedDict):
    """evaluate.json or pages.json: the result of a phase, and the digest of what it was made from."""

    made_from: str
    result: dict[str, Any]


def read_phase(path: Path, made_from: str) -> dict[str, Any] | None:
    """The result of a phase, if it was made from the same; None if not, or if the file is missing or damaged."""
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path, Phase, cure="making it again")
    except UserError as damage:
        logger.warning("%s", damage)
        return None
    return found["result"] if found["made_from"] == made_from else None


def alerts(figures: Mapping[str, Any]) -> list[str]:
    """What is badly wrong with a dictionary's figures, a clause each."""
    fvu, l0 = figures.get("fvu"), figures.get("l0")
    found = []
    if l0 == 0:
        found.append("not one latent is active")
    if fvu is not None and fvu > 1:
        found.append(f"FVU {fvu:.4g} is worse than the mean of the rows alone, whose FVU is 1")
    return found


def weights_digest(dictionary: Path) -> str:
    """The hash of a dictionary's weights, verified; evaluations depend on it."""
    return check(dictionary)[WEIGHTS]


def alert_entry(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The key `alerts` of a summary, or nothing where all figures are sane; alerts are logged too."""
    cure = "the training diverged or has hardly begun: see metrics.jsonl, lower train.lr or train longer"
    named = {"" if name == MAIN else f"{name}: ": alerts(own) for name, own in figures.items()}
    found = [f"{name}on held-out rows {'; '.join(of)} ({cure})" for name, of in named.items() if of]
    for alert in found:
        logger.error("ALERT: %s", alert)
    return {"alerts": found} if found else {}


def summarize(
    job: TrainJob, *, hooks: Hooks, store: Store, trained: Finished, hashed: str, figures: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The summary of a finished training; `wall_seconds` is for the caller to fill in last.

    `figures` of every dictionary by name. Those of `more_dictionaries`, if there are any, are listed under that key.
    """
    main, *others = job.members
    also = [
        {
            "name": member.name,
            "dictionary": str(member.folder(Path(job.out))),
            "n_latents": member.sae.n_latents,
            "k": target_k(member.sae),
            "seed": member.seed,
            "lr": member.peak_lr(job.train.n_steps),
            "eval": figures[member.name],
        }
        for member in others
    ]
    return (
        {
            "name": job.out.rstrip("/").rpartition("/")[2],
            "config_hash": hashed,
            "store": job.store,
            **sides(hooks, store.meta),
            "dictionary": f"{job.out}/dictionary",
            "n_latents": job.sae.n_latents,
            "k": target_k(job.sae),
            "tokens_trained": trained.tokens,
            "steps": trained.steps,
            "wall_seconds": None,
            "tokens_per_second": round(trained.tokens / trained.seconds, 1),
            "order_hash": trained.order_hash,
            "eval": figures[main.name],
        }
        | ({"also": also} if also else {})
        | _twins(job, hooks, store, figures)
        | alert_entry(figures)
    )


def _twins(job: TrainJob, hooks: Hooks, store: Store, figures: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The key `twins` of a summary, or nothing where none was asked for."""
    if not job.twins:
        return {}
    parts = [x.float() for x, _ in first_heldout_pairs(store, hooks, TWIN_ROWS)]
    x = torch.cat(parts) if parts else None
    main = dictionary.load(folder(Path(job.out), MAIN))
    found = {}
    for twin in job.twins:
        name = twin_name(twin)
        theirs = dictionary.load(folder(Path(job.out), name))
        found[twin] = twins.compare(main, theirs, x, main=figures[MAIN], twin=figures[name])
    return {"twins": found}
