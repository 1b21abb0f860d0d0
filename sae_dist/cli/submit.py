"""Give a command, as it runs here, to a cluster's scheduler: it goes on without this terminal.

    sae-dist submit COMMAND key=value ... scheduler=ray|slurm|kuberay|skypilot|torchrun [dry_run=true]

Keys of the scheduler stand among those of the command; docs/submit.md has them all. The same line again does no harm: a
job that is there is shown, one that is done is not repeated, one that was stopped or died goes on. Folders become
absolute, and must be the same on the cluster's nodes. Example:
    sae-dist submit train store=s3://bucket/mine out=/shared/runs/mine scheduler=ray address=http://127.0.0.1:8265
"""

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from sae_dist.cli import keys, sweep
from sae_dist.cli.compose import compose, options, spelled_out
from sae_dist.config import UserError, frozen, load, to_dict
from sae_dist.service.config import absolute_uri
from sae_dist.service.submit.job import Job, refuse_webhook
from sae_dist.service.submit.schedulers import Scheduler, render, submit

PLACES = ("out", "mirror", "store", "tensorboard", "text.path", "text.template", "train.checkpoints", "train.cache",
          "train.start_from")  # folders, files or URIs  # fmt: skip


@frozen
class Submit:
    """Which command, and where to."""

    command: Literal["run", "harvest", "train", "evaluate", "pages", "sweep"]  # the first word
    arguments: tuple[str, ...] = ()  # its key=value
    scheduler: Scheduler
    dry_run: bool = False  # print what would be sent, and send nothing


CONFIG = Submit
KINDS = keys.groups(Submit)["scheduler"]
COMMANDS = get_args(Submit.__annotations__["command"])


def of_command(arguments: Sequence[str], *, show: bool) -> int:
    """`arguments`: the command that is sent, and keys of both; `show`: says what they make, and does nothing."""
    command, *words = arguments or ("",)
    if command not in COMMANDS:
        raise UserError(f"submit {command or '...'}: name the command first, one of {', '.join(COMMANDS)}")
    kind, own, others = _told_apart(words)
    try:
        job = job_of(command, others)
    except UserError as error:
        unknown = str(error).startswith("unknown key")
        also = ", ".join([*_fields(kind), "dry_run"])
        raise UserError(f"{error}{f'; those of scheduler={kind} are {also}' if unknown else ''}") from None
    try:
        values = compose("submit", [f"command={command}", *own]) | {"arguments": list(job.arguments)}
        config = load(Submit, values)
    except UserError as error:
        raise UserError(str(error).replace("scheduler.", "")) from None
    shown = yaml.safe_dump(values, sort_keys=False) if show else render(job, config.scheduler)
    if show or config.dry_run:
        print(shown)
        return 0
    return submit(job, config.scheduler)


def job_of(command: str, words: Sequence[str]) -> Job:
    """The command line with absolute places, checked by what checks it when it runs here."""
    if any(_key(word) == "cluster" for word in words):
        raise UserError("cluster= is set by the scheduler; leave it out")
    refuse_webhook(words)
    if command == "sweep":
        return _job_of_sweep(words)
    module = importlib.import_module(f"sae_dist.cli.{command}")
    given = [_absolute(word, module.CONFIG) for word in spelled_out(command, words)]
    config = load(module.CONFIG, compose(command, given))
    values, places = to_dict(config.with_absolute_paths()), _places(config)
    for key, place in places.items():
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, values)[last] = place
    return Job(command, _with_places(given, places), values)


def _job_of_sweep(words: Sequence[str]) -> Job:
    """As `job_of`, of a sweep: all its points are checked, and its folder is the job's."""
    line = sweep.read(words)
    given = [_absolute(word, sweep.CONFIGS[line.command]) for word in words]
    (_, config), *_ = list(line.configured())
    places = _places(config) | {"out": str(sweep.folder_of(line.command, line.job).path)}
    for key in places.keys() & {axis.key for axis in line.swept.axes}:
        raise UserError(f"{key}= takes several values here; submit a sweep of each")
    arguments = _with_places(given, places)
    values = {"arguments": sorted(arguments), "out": places["out"], "cluster": config.cluster}
    return Job("sweep", arguments, values)


def _places(config: Any) -> dict[str, str]:
    """The folders, files and URIs that a configuration names, as every machine finds them."""
    values = to_dict(config.with_absolute_paths())
    found = {key: _leaf(values, key) for key in PLACES}
    places = {key: absolute_uri(place) for key, place in found.items() if place and isinstance(place, str)}
    _refuse_relative(to_dict(config))
    if _leaf(values, "text.kind") == "huggingface":
        places.pop("text.path", None)
    if _leaf(values, "model.name") != _leaf(to_dict(config), "model.name"):  # a folder
        places["model.name"] = values["model"]["name"]
    return places


def _refuse_relative(values: Mapping[str, Any]) -> None:
    """UserError for a relative place within a list: only places that are keys of their own become absolute."""
    sources = [each for each in _leaf(values, "text.sources") or () if each["kind"] != "huggingface"]
    more = _leaf(values, "more_dictionaries") or ()
    inner = [("text.sources", key, each.get(key)) for each in sources for key in ("path", "template")]
    inner += [("more_dictionaries", "start_from", each.get("start_from")) for each in more]
    for where, key, place in inner:
        if place and "://" not in place and not Path(place).is_absolute():
            raise UserError(f"{where}: {key}: {place} is relative, and a job has another folder; write it whole")


def _with_places(words: Sequence[str], places: Mapping[str, str]) -> tuple[str, ...]:
    return (*(word for word in words if _key(word) not in places), *(f"{key}={at}" for key, at in places.items()))


def _told_apart(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The scheduler, the keys of the submission as Hydra takes them, and the words of the command."""
    kinds = [word.partition("=")[2] for word in words if _key(word) == "scheduler"]
    if not kinds or kinds[-1] not in KINDS:
        said = f"scheduler={kinds[-1]} is not known" if kinds else "scheduler is missing"
        raise UserError(f"{said}; set scheduler= to one of {', '.join(KINDS)}")
    kind, own, others = kinds[-1], [], []
    for word in words:
        key = _key(word)
        having = [name for name in KINDS if key in _fields(name)]
        if key in ("scheduler", "dry_run"):
            own.append(word)
        elif kind in having:
            own.append(f"scheduler.{word}")
        elif having:
            raise UserError(
                f"{key}= is a key of scheduler={' and '.join(having)}, not of scheduler={kind}; leave it out"
            )
        else:
            others.append(word)
    return kind, own, others


def _fields(kind: str) -> list[str]:
    return [field.name for field in dataclasses.fields(KINDS[kind]) if field.name != "kind"]


def _key(word: str) -> str:
    return word.partition("=")[0]


def _leaf(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _absolute(word: str, config: type) -> str:
    """`text=corpus` as another machine finds it, if it is something that lies here."""
    key, _, value = word.partition("=")
    place = value.strip("'\"")
    if key != "text" or place in options(key, config) or not Path(place).exists():
        return word
    return f"{key}={Path(place).absolute()}"
