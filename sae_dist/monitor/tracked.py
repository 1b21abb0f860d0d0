"""What a tracker calls one dictionary of a run, its harvest or an evaluation of it: the same at every start."""

from typing import Any, Literal, NamedTuple

from sae_dist.config import digest

JobType = Literal["harvest", "train", "evaluate", "sweep"]


class TrackedRun(NamedTuple):
    """One run of a tracker. `prefix`: of the dictionary's figures in metrics.jsonl, empty for the main one."""

    id: str
    name: str
    group: str
    job_type: JobType
    prefix: str
    config: dict[str, Any]


class Artifact(NamedTuple):
    """Something that a run has made: where it is, and the digest of it. Its bytes are never sent."""

    kind: str  # dictionary or manifest
    uri: str
    digest: str


def run_id(*, out: str, config_hash: str, job_type: JobType, member: str) -> str:
    """Equal for all attempts of a run in one folder, and for nothing else."""
    return digest([out, config_hash, job_type, member])[:16]
