"""summary.json: the final figures of a run. A figure that was not measured is null, never a guess."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sae_dist.config import UserError
from sae_dist.sae.dictionary import WEIGHTS, check
from sae_dist.service.config import TrainJob
from sae_dist.shards.reader import Store
from sae_dist.train.member import Member

logger = logging.getLogger(__name__)


class Finished(Protocol):
    """What training reports."""

    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def order_hash(self) -> str: ...
    @property
    def seconds(self) -> float: ...


def read_finished(out: Path, hashed: str, members: Iterable[Member]) -> dict[str, Any] | None:
    """The summary that a finished run of the same configuration left in `out`, with all of its dictionaries sound.

    None when there is none; what is gone or damaged is said in the log, and is made again by going on.
    """
    path = out / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("config_hash") != hashed:
        return None
    try:
        for member in members:
            check(member.folder(out))
    except UserError as damage:
        logger.warning("this run had finished, but %s; making what is missing again", damage)
        return None
    return found


def weights_digest(dictionary: Path) -> str:
    """What judgements of a dictionary hang on: the hash of its weights, which are what it says."""
    return check(dictionary)[WEIGHTS]


def summarize(
    job: TrainJob, *, hook: str, store: Store, trained: Finished, hashed: str, figures: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The summary of a finished training; `wall_seconds` is for the caller to fill in last.

    `figures` of every dictionary by name. Those of `also`, if there are any, are listed under that key.
    """
    main, *others = job.members
    also = [
        {
            "name": member.name,
            "dictionary": str(member.folder(Path(job.out))),
            "n_latents": member.sae.n_latents,
            "k": member.sae.k,
            "seed": member.seed,
            "lr": member.peak_lr,
            "eval": figures[member.name],
        }
        for member in others
    ]
    return {
        "name": job.out.rstrip("/").rpartition("/")[2],
        "config_hash": hashed,
        "store": job.store,
        "hook": hook,
        "dictionary": f"{job.out}/dictionary",
        "n_latents": job.sae.n_latents,
        "d_model": store.meta.hooks[hook],
        "k": job.sae.k,
        "tokens_trained": trained.tokens,
        "steps": trained.steps,
        "wall_seconds": None,
        "tokens_per_second": round(trained.tokens / trained.seconds, 1),
        "order_hash": trained.order_hash,
        "eval": figures[main.name],
    } | ({"also": also} if also else {})
