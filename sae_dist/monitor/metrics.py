"""metrics.jsonl: one object a line, appended; the truth that everything else is made of."""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import UserError
from sae_dist.system_errors import naming_file

Log = Callable[[int, Mapping[str, Any]], None]  # (step, figures)


class JsonLines:
    """A Log that appends one object a line and flushes it: a killed run keeps all but its last line.

    Several processes may append to one file. Lines of a `phase` other than training's have no step, only the phase.
    """

    def __init__(self, path: Path, *, phase: str = "train") -> None:
        self._phase = phase
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # what a full disk did not take is not tried again when it is closed
        if not _ends_a_line(path):
            self._append(b"\n")  # after the line that a kill cut short

    def __call__(self, step: int, figures: Mapping[str, Any]) -> None:
        place = {"step": step} if self._phase == "train" else {"phase": self._phase}
        entry = {**place, "time": round(time.time(), 3), **figures}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._append(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        """All of the line in one write, so that lines of several processes do not mix; OSError when it did not fit."""
        with naming_file(self._path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl by step; a step that was done again counts as done last."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    entries = [entry for line in lines if (entry := _training_line(path, line)) is not None]
    by_step = {entry["step"]: entry for entry in entries}
    return [by_step[step] for step in sorted(by_step)]


def newest_metrics(path: Path) -> dict[str, Any]:
    """The last whole training line of metrics.jsonl, empty when there is none; reads the end of the file only."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 262_144, 0))  # other phases write there too
        lines = file.read().split(b"\n")
    return next((entry for line in reversed(lines) if (entry := _training_line(path, line)) is not None), {})


def metrics_lines(data: bytes, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training, and those of harvesting, in the end of the metrics.jsonl `name`.

    UserError for what is no line of a run.
    """
    training, harvest = [], []
    for line in data.split(b"\n"):
        if (entry := _training_line(name, line)) is not None:
            training.append(entry)
        elif (entry := _harvest_line(line)) is not None:
            harvest.append(entry)
    return training, harvest


def _harvest_line(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and entry.get("phase") == "harvest" else None


def _training_line(path: Path | str, line: bytes) -> dict[str, Any] | None:
    """A line as an object with a step; None for a phase without steps, and for what a kill cut short or is in writing.

    No beginning of an object is JSON, so JSON that is no line of a run is damage: UserError.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(entry, dict) and "phase" in entry:
        return None
    figures = entry.values() if isinstance(entry, dict) and type(entry.get("step")) is int else [[]]
    if not all(_is_figure(value) for value in figures):
        shown = line[:60].decode(errors="replace")
        raise UserError(f"{path} is damaged: {shown} is no line of a run; remove that line and repeat the command")
    return entry


def _is_figure(value: object) -> bool:
    match value:
        case int():
            return abs(value) < 2**63
        case float():
            return math.isfinite(value)
        case _:
            return value is None or isinstance(value, str)


def tee(*logs: Log) -> Log:
    """One Log that feeds several."""

    def log(step: int, figures: Mapping[str, Any]) -> None:
        for each in logs:
            each(step, figures)

    return log
