"""metrics.jsonl: one object a line, appended; the truth that everything else is made of.

Lines of the training have a `step`, all others a `phase`: start (of an attempt), harvest, evaluate, alert, artifact.
"""

import errno
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sae_dist.config import UserError
from sae_dist.system_errors import naming_file

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, Any]], None]  # (step, figures)
Phase = Literal["train", "start", "harvest", "evaluate", "alert", "artifact"]
AT_ONCE = 1 << 24  # bytes of the file that a follower has in memory
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what a file system answers that has none


class JsonLines:
    """A Log that appends one object a line and flushes it: a killed run keeps all but its last line.

    Several processes may append to one file, on several machines, too, unless it is not `shared`: then no line waits
    for a lock, which on NFS takes milliseconds. Lines of a `phase` other than training's have no step, only the phase.
    """

    def __init__(self, path: Path, *, phase: Phase = "train", shared: bool = True) -> None:
        self._phase, self._path, self._may_lock = phase, path, shared
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
        """All of the line in one write, while no other process appends; OSError when it did not fit."""
        with naming_file(self._path), self._alone() as locked:
            written = self._file.write(line)
            if written != len(line):
                if locked:  # the next line, perhaps of another process, would continue the part that fitted
                    self._file.truncate(self._file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Holds the file's lock, and waits while another process does; False where there is no lock to hold.

        NFS cannot append: each machine writes at the end that it knows, and two of them at the same place. Its lock
        makes the end known when it is taken, and the line when it is released.
        """
        locked = self._lock()
        try:
            yield locked
        finally:
            if locked:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        """Takes the file's lock. False where there is none: one machine writes whole lines without, so no run ends."""
        if not self._may_lock:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._may_lock = False
            logger.warning("%s: %s; lines of several machines may overwrite each other", self._path, error.strerror)
        return self._may_lock

    def close(self) -> None:
        self._file.close()


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


class Follower:
    """Reads metrics.jsonl as it grows, a part at a time; the file may not be there yet.

    From its beginning, or, with `from_end`, only what is said from now on.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path, self._at = path, path.stat().st_size if from_end and path.is_file() else 0

    def read(self) -> list[dict[str, Any]]:
        """The whole lines since the last call, in their order, AT_ONCE bytes at most; empty when there are none."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            part, newline, _ = file.read(AT_ONCE).rpartition(b"\n")
        self._at += len(part) + len(newline)
        return [entry for line in part.split(b"\n") if (entry := entry_of(self._path, line)) is not None]


def by_step(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training lines among `entries` by step; a step that was done again counts as done last."""
    steps = {entry["step"]: entry for entry in entries if "phase" not in entry}
    return [steps[step] for step in sorted(steps)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl by step."""
    follower, entries = Follower(path), list[dict[str, Any]]()
    while part := follower.read():
        entries += part
    return by_step(entries)


def newest_metrics(path: Path) -> dict[str, Any]:
    """The last whole training line of metrics.jsonl, empty when there is none; reads the end of the file only."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 262_144, 0))  # other phases write there too
        lines = file.read().split(b"\n")
    found = (entry_of(path, line) for line in reversed(lines))
    return next((entry for entry in found if entry is not None and "phase" not in entry), {})


def metrics_lines(data: bytes, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training, and those of harvesting, in the end of the metrics.jsonl `name`.

    UserError for what is no line of a run.
    """
    entries = [entry for line in data.split(b"\n") if (entry := entry_of(name, line)) is not None]
    training = [entry for entry in entries if "phase" not in entry]
    return training, [entry for entry in entries if entry.get("phase") == "harvest"]


def entry_of(path: Path | str, line: bytes) -> dict[str, Any] | None:
    """A line as an object with a step or a phase; None for what a kill cut short or is in writing.

    No beginning of an object is JSON, so JSON that is no line of a run is damage: UserError.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(entry, dict) and isinstance(entry.get("phase"), str):
        return entry
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or not all(map(_is_figure, entry.values())):
        shown = line[:60].decode(errors="replace")
        raise UserError(f"{path} is damaged: {shown} is no line of a run; remove that line and repeat the command")
    return entry


def _is_figure(value: object) -> bool:
    match value:
        case int():
            return abs(value) < 2**63
        case float():
            return math.isfinite(value)
        case list():  # the counts of a histogram
            return len(value) > 1 and all(type(each) is int and 0 <= each < 2**63 for each in value)
        case _:
            return value is None or isinstance(value, str)


def tee(*logs: Log) -> Log:
    """One Log that feeds several."""

    def log(step: int, figures: Mapping[str, Any]) -> None:
        for each in logs:
            each(step, figures)

    return log
