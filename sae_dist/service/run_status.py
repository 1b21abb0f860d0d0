"""What a run is doing, or what came of it, as its files alone say: in its folder, or in a copy on object storage."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

from sae_dist.config import UserError, load
from sae_dist.monitor.metrics import metrics_lines
from sae_dist.run_files import parse_json, parse_yaml
from sae_dist.service.run_folder import CONFIG_CURE, ENDED, LOCK, STATUS_CURE, Status, is_claimed
from sae_dist.service.summary import SUMMARY_CURE, Summary
from sae_dist.storage import Storage, StorageError
from sae_dist.system_errors import user_error
from sae_dist.train.config import TrainConfig

T = TypeVar("T")
Lines = list[dict[str, Any]]

SILENT_S = 45.0  # a run at work writes its status every 15 s at most, and a copy of it is some seconds younger
TAIL_BYTES = 262_144  # of metrics.jsonl
RECENT = 10  # lines that present rates are taken over
FILES = ("status.json", "config.yaml", "metrics.jsonl")  # one of them is in every run's folder
PHASES = {"evaluate": "evaluating", "pages": "writing pages"}


class RunStatus(NamedTuple):
    """What could be read of a run at `now` (seconds since the epoch)."""

    place: str
    now: float
    claimed: bool | None  # whether a process works in the folder; None of a copy, where nobody can tell
    said: Mapping[str, Any]  # status.json; empty when there is none, or no whole one
    config: Mapping[str, Any]  # config.yaml; likewise
    training: Lines  # the newest lines of metrics.jsonl, oldest first: of the training
    harvest: Lines  # and of the harvest
    summary: Mapping[str, Any] | None
    damage: tuple[str, ...]  # a line for every file that is not what was written: which one, and the cure

    @property
    def age_s(self) -> float | None:
        """Since the run last wrote its status."""
        return max(self.now - self.said["time"], 0.0) if self.said else None

    @property
    def state(self) -> str:
        """The phase that it is in, or how it ended: done, stopped, refused, failed.

        dead: no process works on it any more. silent: a copy that has nothing new. unknown: no status.json says it.
        """
        if (state := self.said.get("state", "")) in ENDED:
            return state
        if self.claimed is False:
            return "dead" if self.said or self.summary is None else "done"
        if not self.said:
            return "unknown" if self.claimed is None else "working"
        return "silent" if self.claimed is None and (self.age_s or 0.0) > SILENT_S else self.phase

    @property
    def phase(self) -> str:
        """What it does, or did at last: preparing, harvesting, training, evaluating, writing pages."""
        said, _, _ = self.said.get("state", "working").partition(" ")  # `evaluate k64`: another dictionary of the pass
        if said != "running":
            return PHASES.get(str(said), str(said))
        harvest, trains = self.said.get("harvest", {}), "train" in self.said
        found = ["harvesting"] if harvest and harvest.get("units") != harvest.get("of") else []
        found += ["training"] if trains and (self.steps is None or self.step < self.steps) else []
        return " and ".join(found) or ("training" if trains else "harvesting")

    @property
    def works(self) -> bool:
        return self.state not in (*ENDED, "dead", "silent", "unknown")

    @property
    def step(self) -> int:
        """Of the training, so far."""
        return self.training[-1]["step"] if self.training else self.said.get("train", {}).get("step", 0)

    @property
    def steps(self) -> int | None:
        """Of the whole training; None where nothing is trained, or nothing says how long."""
        try:
            return load(TrainConfig, self.config["train"]).n_steps
        except (KeyError, TypeError, UserError):
            return self.said.get("train", {}).get("of")

    @property
    def command(self) -> str | None:
        """What repeats the run, with the folder to type it in where that is another one."""
        command, directory = self.said.get("command"), self.said.get("directory")
        if command is None:
            return None
        return command if directory in (None, str(Path.cwd())) else f"cd {directory} && {command}"


def rate(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """How fast a figure grows now, a second: the median between neighbours of the last lines; None without any.

    The time in which a run stood still lies between two lines only.
    """
    known = [(line["time"], line[key]) for line in lines if _is_number(line.get(key)) and _is_number(line.get("time"))]
    known = known[-RECENT - 1 :]
    steps = [(t1 - t0, v1 - v0) for (t0, v0), (t1, v1) in zip(known, known[1:], strict=False)]
    found = [grown / seconds for seconds, grown in steps if seconds > 0 and grown >= 0]
    return median(found) if found else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_run(place: Storage, *, now: float | None = None) -> RunStatus | None:
    """What the files at `place` say; None when there is no run. UserError when the storage does not answer."""
    files = _Files(place)
    said = files.read("status.json", lambda data, name: parse_json(data, Status, name=name, cure=STATUS_CURE))
    config = files.read("config.yaml", lambda data, name: parse_yaml(data, name=name, cure=CONFIG_CURE))
    lines = files.read("metrics.jsonl", metrics_lines, tail=TAIL_BYTES)
    if not files.found:
        return None
    summary = files.read("summary.json", lambda data, name: parse_json(data, Summary, name=name, cure=SUMMARY_CURE))
    lock = place.local_path(LOCK)
    claimed = is_claimed(lock.parent) if lock is not None and lock.exists() else None
    training, harvest = lines or ([], [])
    return RunStatus(
        place.uri, time.time() if now is None else now, claimed, dict(said or {}), config or {}, training, harvest,
        summary and dict(summary), tuple(files.damage),
    )  # fmt: skip


class _Files:
    """Files at a place: what was found there, and what of it is damaged."""

    def __init__(self, place: Storage) -> None:
        self._place = place
        self.found: list[str] = []
        self.damage: list[str] = []

    def read(self, name: str, parse: Callable[[bytes, str], T], *, tail: int | None = None) -> T | None:
        """What `parse` makes of the file, or of its last `tail` bytes; None when it is not there, or damaged."""
        whole, local = f"{self._place.uri}/{name}", self._place.local_path(name) is not None
        try:
            start = None if tail is None else max(self._place.size(name) - tail, 0)
            data = bytes(self._place.read(name, start))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (StorageError, OSError) as error:
            if not local:
                raise
            self.found.append(name)
            self.damage.append(str(user_error(error) or error) if isinstance(error, OSError) else _irregular(whole))
            return None
        self.found.append(name)
        try:
            return parse(data, whole)
        except UserError as damage:
            self.damage.append(str(damage))
            return None


def _irregular(name: str) -> str:
    return f"{name} is no regular file; remove it"
