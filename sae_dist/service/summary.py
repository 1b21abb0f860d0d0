"""summary.json: the final figures of a run. A figure that was not measured is null, never a guess."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import xxhash

from sae_dist.service.config import TrainJob
from sae_dist.shards.reader import Store


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


def read_finished(out: Path, hashed: str) -> dict[str, Any] | None:
    """The summary that a finished run of the same configuration left in `out`, None when there is none."""
    path = out / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("config_hash") == hashed else None


def weights_digest(dictionary: Path) -> str:
    """What judgements of a dictionary hang on: the hash of its weights."""
    return xxhash.xxh3_128_hexdigest((dictionary / "dictionary.safetensors").read_bytes())


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
