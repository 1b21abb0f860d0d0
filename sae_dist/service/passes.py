"""A pass of a sweep: one process that trains several points over the same rows, and the run folder that each gets.

The process runs the sweep's own command, `train` or `run`, with the first point as the main dictionary and the others
beside it. Its folder is a run folder too, so a pass that was stopped or killed goes on where it was.
"""

import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typing_extensions import TypedDict

from sae_dist import storage
from sae_dist.config import UserError, load, to_dict
from sae_dist.monitor.config import public
from sae_dist.monitor.metrics import JsonLines, read_metrics
from sae_dist.monitor.panels import of_dictionary
from sae_dist.run_files import read_json, write_json, write_whole
from sae_dist.sae import dictionary
from sae_dist.service.config import RunConfig, TrainJob, config_hash, evaluation_digest
from sae_dist.service.monitoring import last_start
from sae_dist.service.rank_session import chosen_hooks
from sae_dist.service.signals import catch_signals
from sae_dist.service.summary import read_summary, summarize
from sae_dist.shards import stores
from sae_dist.train.members import MAIN, folder

CONFIGS: Mapping[str, type[TrainJob] | type[RunConfig]] = {"train": TrainJob, "run": RunConfig}  # what can be swept
RECORD = "pass.json"
TEXT = "text"  # the tokens of `run`, which all passes share


class PassRecord(TypedDict):
    """pass.json: what a pass trains. The first point is its main dictionary."""

    command: str
    points: dict[str, dict[str, Any]]  # resolved configurations by id


def write_record(path: Path, command: str, points: Mapping[str, Mapping[str, Any]]) -> None:
    write_json(path / RECORD, {"command": command, "points": {name: public(one) for name, one in points.items()}})


def read_record(path: Path) -> PassRecord:
    return read_json(path / RECORD, PassRecord, cure="remove that folder, and repeat the sweep's command")


def pass_job(record: PassRecord, out: Path) -> TrainJob | RunConfig:
    """The configuration that trains all points of a pass into `out`."""
    (first, values), *others = record["points"].items()
    more = [
        {
            **own["sae"],
            "name": point,
            **{key: own["train"][key] for key in ("lr", "parameters", "moments", "start_from")},
        }
        for point, own in others
    ]
    train = dict(values["train"])
    if train["checkpoints"] is not None:  # a place for one training at a time
        train["checkpoints"] = f"{train['checkpoints'].rstrip('/')}/{out.name}"
    wandb = {**values["wandb"], "group": values["wandb"]["group"] or out.parents[1].name}
    return load(
        CONFIGS[record["command"]],
        {**values, "out": str(out), "more_dictionaries": more, "train": train, "wandb": wandb},
    )


def run_pass(path: Path) -> None:
    """Trains a pass to its end, in this process, which stops and saves once the driver that started it is gone."""
    job = pass_job(read_record(path), path)
    threading.Thread(target=_stop_with_driver, name="driver", daemon=True).start()
    if isinstance(job, RunConfig):
        from sae_dist.service.run_job import run  # Ray and language models: what a driver does without

        text = path / TEXT
        if not text.is_symlink():
            text.symlink_to(Path("..") / ".." / TEXT, target_is_directory=True)
        (path.parents[1] / TEXT).mkdir(exist_ok=True)
        run(job)
    else:
        from sae_dist.service.train_job import train_and_evaluate

        with catch_signals() as request:
            train_and_evaluate(job, stop=request.made)


def _stop_with_driver() -> None:
    """Standard input is a pipe from the driver: it ends when the driver does, however that ends."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def is_finished(path: Path) -> bool:
    """Whether a pass has come to its end, and its points have not got their folders yet."""
    return (path / "summary.json").exists()


def hand_out(path: Path, points: Mapping[str, TrainJob | RunConfig]) -> dict[str, float]:
    """Gives each of these points of a finished pass its run folder; their shares of the seconds of training.

    A folder comes whole or not at all. Files are links to those of the pass, which nobody changes.
    """
    summary, all_points = read_summary(path), list(read_record(path)["points"])
    judged = {all_points[0]: summary} | {one["name"]: one for one in summary.get("also", [])}
    latents = sum(one["n_latents"] for one in judged.values())
    seconds = {}
    for point, config in points.items():
        share = judged[point]["n_latents"] / latents
        seconds[point] = share * summary["tokens_trained"] / summary["tokens_per_second"]
        target = Path(str(config.out))
        if not (target / "summary.json").exists():
            name = MAIN if point == all_points[0] else point
            _place(path, target, name=name, config=config, summary=summary, figures=judged[point]["eval"], share=share)
    return seconds


class _Finished(NamedTuple):
    steps: int
    tokens: int
    order_hash: str
    seconds: float


def _place(
    path: Path, target: Path, *, name: str, config: TrainJob | RunConfig, summary: Mapping[str, Any],
    figures: dict[str, Any], share: float,
) -> None:  # fmt: skip
    """The run folder of the dictionary `name` of a pass, as training it alone would have left it."""
    store = stores.open(storage.open(summary["store"]))
    hashed = config_hash(config, store.meta.digest)
    job = config.train_job() if isinstance(config, RunConfig) else config
    tokens = summary["tokens_trained"]
    trained = _Finished(summary["steps"], tokens, summary["order_hash"], tokens / summary["tokens_per_second"])
    own = summarize(
        job, hooks=chosen_hooks(store, job), store=store, trained=trained, hashed=hashed, figures={MAIN: figures}
    ) | {"wall_seconds": round(share * summary["wall_seconds"], 1)}  # fmt: skip
    source, part = folder(path, name), target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    dictionary.link(source, part / "dictionary", config_hash=hashed)
    prefixes = ["", *(f"{one['name']}/" for one in summary.get("also", []))]
    prefix = "" if name == MAIN else f"{name}/"
    with closing(JsonLines(part / "metrics.jsonl", phase="start")) as lines:
        lines(0, {**last_start(path), "member": name})  # trackers know it as a dictionary of the pass
    lines = JsonLines(part / "metrics.jsonl", shared=False)
    for line in read_metrics(path / "metrics.jsonl"):
        lines(line["step"], of_dictionary(line, prefix, [other for other in prefixes if other != prefix]))
    lines.close()
    if isinstance(config, RunConfig):
        own["judged"] = evaluation_digest(config)
        os.link((path if name == MAIN else source) / "evaluate.json", part / "evaluate.json")
        shutil.copytree(path / TEXT, part / TEXT, copy_function=os.link)
    write_json(part / "summary.json", own)
    write_whole(part / "config.yaml", yaml.safe_dump(public(to_dict(config)), sort_keys=False))
    write_json(part / "status.json", _status(own))
    _rename(part, target)


def adopt(rung: TrainJob | RunConfig, target: Path) -> None:
    """Makes the run folder of a rung, or rather a copy that shares its files, that of its point."""
    source = Path(str(rung.out))
    if (target / "summary.json").exists():
        return
    part = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    shutil.copytree(source, part, copy_function=os.link)
    moved = {"name": target.name, "dictionary": str(target / "dictionary")}
    write_json(part / "summary.json", read_summary(source) | moved)
    values = public(to_dict(rung)) | {"out": str(target)}
    write_whole(part / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    _rename(part, target)


def _rename(part: Path, target: Path) -> None:
    """Puts a folder in its place, unless an equal one is there."""
    try:
        part.rename(target)
    except OSError:
        shutil.rmtree(part)
        if not (target / "summary.json").exists():
            raise UserError(
                f"{target} is in the way: it holds no finished run; remove it, and repeat the sweep's command"
            ) from None


def _status(summary: Mapping[str, Any]) -> dict[str, Any]:
    """status.json of a run that has ended with this summary."""
    found = {key: summary[key] for key in ("wall_seconds", "alerts") if key in summary}
    ended = {"state": "done", "time": round(time.time(), 1), "pid": os.getpid()}
    return ended | {"step": summary["steps"], "tokens": summary["tokens_trained"]} | found


def clear(path: Path) -> None:
    """Removes from the folder of a pass what its points have in theirs, and its checkpoints."""
    (path / "summary.json").unlink(missing_ok=True)  # first: it says that they are there
    for part in ("dictionary", "dictionaries", "checkpoints"):
        shutil.rmtree(path / part, ignore_errors=True)
