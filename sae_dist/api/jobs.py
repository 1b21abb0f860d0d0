"""`sae_dist.train`, `run` and `sweep`: the commands of these names with the same keys, as functions."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from os import PathLike
from typing import Any

import numpy as np

from sae_dist.cli import sweep as sweep_command
from sae_dist.cli.compose import compose, options, quoted
from sae_dist.cli.keys import groups
from sae_dist.config import UserError, load
from sae_dist.service.config import RunConfig, TrainJob
from sae_dist.service.run_job import run as run_job
from sae_dist.service.signals import catch_signals
from sae_dist.service.train_job import train_and_evaluate


def train(config: Mapping[str, Any] | None = None, /, **keys: Any) -> dict[str, Any] | None:
    """`sae-dist train`: a store to a dictionary, or to several; returns summary.json. Repeating the call resumes.

    Keys are those of the command line: store="stores/mine", sae="topk", out="runs/mine", and with dots either in a
    dict, {"sae.n_latents": 512}, or nested, sae={"kind": "topk", "n_latents": 512}. An interrupt (Ctrl-C, the stop
    button) finishes the step, saves, and raises `sae_dist.config.Stopped`. UserError for what you can cure.
    None in processes of torchrun but the first.
    """
    values = compose("train", overrides(config, keys, config_class=TrainJob))
    with _stoppable() as stop:
        return train_and_evaluate(load(TrainJob, values), stop=stop)


def run(config: Mapping[str, Any] | None = None, /, **keys: Any) -> dict[str, Any]:
    """`sae-dist run`: harvest, train, evaluate and feature pages under Ray; returns summary.json.

    Keys as of `train`. Repeating the call resumes. Call it from the main thread.
    """
    return run_job(load(RunConfig, compose("run", overrides(config, keys, config_class=RunConfig))))


def sweep(
    command: str, config: Mapping[str, Any] | None = None, /, *, over: Mapping[str, Sequence[Any]], **keys: Any
) -> list[dict[str, Any]]:
    """`sae-dist sweep COMMAND`: every combination of the values in `over`, each trained once, in shared passes.

    over={"sae.k": [16, 32], "seed": [0, 1]}. Other keys as of `train` or `run`, and those of the sweep: out, retry,
    sweep. Returns a dict a point: id, overrides, state (done or failed), failure, summary. Repeating the call goes on.
    """
    config_class = sweep_command.CONFIGS.get(command)
    fixed = overrides(config, keys, config_class=config_class)
    axes = [
        f"{key}=" + ",".join(_override(key, value, _is_group(key, config_class)).partition("=")[2] for value in values)
        for key, values in over.items()
    ]
    line = [command, *fixed, *axes]
    points = sweep_command.work(sweep_command.read(line), line)
    return [
        {"id": p.id, "overrides": dict(p.overrides), "state": p.state, "failure": p.failure, "summary": p.summary}
        for p in points
    ]


def overrides(config: Mapping[str, Any] | None, keys: Mapping[str, Any], *, config_class: type | None) -> list[str]:
    """The keys as a command line has them; groups (sae, model, text, ...) first, as `kind` or as a name."""
    found: dict[str, Any] = {}
    for given in (config or {}, keys):
        for key, value in given.items():
            nested = value if isinstance(value, Mapping) else None
            parts = {key: value} if nested is None else {f"{key}.{inner}": each for inner, each in nested.items()}
            for path, each in parts.items():
                group, _, last = path.rpartition(".")
                path = group if last == "kind" and _is_group(group, config_class) else path
                if path in found:
                    raise UserError(f"{path} is given twice, as {found[path]} and as {each}; give it once")
                found[path] = each
    first = sorted(found, key=lambda path: not _is_group(path, config_class))
    return [_override(path, found[path], _is_group(path, config_class)) for path in first]


def _is_group(key: str, config_class: type | None) -> bool:
    """Whether a key names an alternative: sae=topk, preset=quickstart, model=gpt2."""
    return bool("." not in key and (options(key, config_class) or (config_class and key in groups(config_class))))


def _override(key: str, value: Any, is_group: bool) -> str:
    plain = isinstance(value, str | PathLike) and is_group
    return f"{key}={value if plain else _literal(value)}"


def _literal(value: Any) -> str:
    """A value in Hydra's grammar, a number of NumPy as one of Python; text is quoted, so that none of it is grammar."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case np.bool_():
            return _literal(bool(value))
        case Integral():
            return repr(int(value))
        case Real():
            return repr(float(value))
        case Mapping():
            return "{" + ",".join(f"{key}:{_literal(each)}" for key, each in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_literal, value)) + "]"
        case _:
            return quoted(str(value))


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Signals ask the training to stop, where Python delivers them: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    with catch_signals() as request:
        yield request.made
