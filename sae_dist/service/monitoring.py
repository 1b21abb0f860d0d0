"""What follows a job while it works: trackers, alerts, an endpoint. What they are told is in metrics.jsonl."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_dist.config import UserError, to_dict
from sae_dist.monitor.config import public
from sae_dist.monitor.metrics import Follower, JsonLines
from sae_dist.monitor.prometheus import endpoint
from sae_dist.monitor.tracked import JobType, TrackedRun, run_id
from sae_dist.monitor.tracker_process import TrackerProcess, wandb_options
from sae_dist.monitor.watch import Watch
from sae_dist.service.config import HarvestJob, RunConfig, TrainJob
from sae_dist.service.summary import weights_digest
from sae_dist.shards.manifest import latest, manifest_key, read
from sae_dist.shards.reader import Store
from sae_dist.train.members import MAIN, Member, prefix_of

Job = RunConfig | HarvestJob | TrainJob


def tell_result(
    job: RunConfig | TrainJob, figures: Mapping[str, Mapping[str, Any]], *, store: Store, tokens: int
) -> None:
    """What came of a training, into metrics.jsonl: where dictionaries and rows are, and the figures of each by name."""
    assert job.out is not None, "the job is not located"
    manifest, version = store.meta.digest, latest(store.storage)
    place = "store.json"
    if version:
        manifest, place = read(store.storage, store.meta, version).digest, manifest_key(version)
    with closing(JsonLines(Path(job.out) / "metrics.jsonl", phase="artifact")) as lines:
        for member in job.members:
            folder = member.folder(Path(job.out))
            uri = (folder / "dictionary.safetensors").as_uri()
            lines(0, {"prefix": member.prefix, "kind": "dictionary", "uri": uri, "digest": weights_digest(folder)})
        where = store.storage.uri if "://" in store.storage.uri else Path(store.storage.uri).as_uri()
        lines(0, {"prefix": "", "kind": "manifest", "uri": f"{where}/{place}", "digest": manifest})
    tell_judged(Path(job.out), figures, tokens=tokens)  # last: the end of the file shows what came of it


def tell_judged(out: Path, figures: Mapping[str, Mapping[str, Any]], *, tokens: int) -> None:
    """The figures of dictionaries after `tokens` of training, into metrics.jsonl."""
    with closing(JsonLines(out / "metrics.jsonl", phase="evaluate")) as lines:
        for name, own in figures.items():
            flat = {key: value for key, value in own.items() if not isinstance(value, Mapping)}
            flat |= {f"density_quantile_{at}": q for at, q in (own.get("density_quantiles") or {}).items()}
            lines(0, {"prefix": prefix_of(name), "tokens_trained": tokens, **flat})


@contextmanager
def monitored(job: Job, *, config_hash: str) -> Iterator[None]:
    """Everything that the job's keys ask for, as long as the context lasts. `job` is located."""
    assert job.out is not None, "the job is not located"
    out, runs = Path(job.out), tracked_runs(job, out=job.out, config_hash=config_hash)
    if job.tensorboard and find_spec("tensorboardX") is None:
        raise UserError("tensorboard= needs tensorboardX; pip install tensorboardX, or leave tensorboard out")
    metrics, steps = out / "metrics.jsonl", None if isinstance(job, HarvestJob) else job.train.n_steps
    with ExitStack() as held:
        held.enter_context(endpoint(job.prometheus, out))
        held.enter_context(closing(Watch(job.alerts, out)))
        with closing(JsonLines(metrics, phase="start")) as lines:
            lines(0, {"out": job.out, "config_hash": config_hash, "steps": steps})
        if job.wandb.mode != "disabled":
            process = TrackerProcess("wandb", wandb_options(job.wandb, out), metrics=metrics, runs=runs)
            held.enter_context(closing(process))
        if job.tensorboard:
            folder = out / "tensorboard" if job.tensorboard is True else Path(job.tensorboard).absolute()
            process = TrackerProcess("tensorboard", {"folder": str(folder)}, metrics=metrics, runs=runs)
            held.enter_context(closing(process))
        yield


def tracked_runs(job: Job, *, out: str, config_hash: str, main: str = MAIN) -> list[TrackedRun]:
    """What trackers call the parts of a job: its harvest, and each dictionary's training and evaluation.

    `main` is what the main dictionary was called where it was trained: a point of a sweep was one of a pass.
    """
    name, values, found = Path(out).name, public(to_dict(job)), []
    group = job.wandb.group or name

    def called(member: Member) -> str:
        return main if member.name == MAIN else member.name

    def add(job_type: JobType, of: Member | None, *ends: str) -> None:
        own = {}
        if of is not None and not isinstance(job, HarvestJob):
            lr = of.peak_lr(job.train.n_steps)
            own = {"sae": to_dict(of.sae), "seed": of.seed, "member": of.name, "lr": lr}
        hashed = run_id(out=out, config_hash=config_hash, job_type=job_type, member="" if of is None else called(of))
        prefix = "" if of is None else of.prefix
        found.append(TrackedRun(hashed, "-".join([name, *ends]), group, job_type, prefix, values | own))

    if not isinstance(job, TrainJob):
        add("harvest", None, "harvest")
    for member in () if isinstance(job, HarvestJob) else job.members:
        ends = () if called(member) == MAIN else (called(member),)
        add("train", member, *ends)
        add("evaluate", member, *ends, "evaluate")
    return found


def last_start(out: Path) -> dict[str, Any]:
    """The line of the last attempt's start; UserError where there is none."""
    follower, found = Follower(out / "metrics.jsonl"), None
    while part := follower.read():
        found = next((entry for entry in reversed(part) if entry.get("phase") == "start"), found)
    if found is None:
        raise UserError(f"{out / 'metrics.jsonl'} holds no start of a run, so there is no history to send")
    return found
