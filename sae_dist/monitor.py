"""What a run says while it works: metrics.jsonl is the truth, W&B a mirror that cannot hurt."""

import contextlib
import errno
import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sae_dist.config import UserError, frozen
from sae_dist.refusals import naming

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, Any]], None]  # (step, figures)


OF_ENVIRONMENT: Any = Field(default=None, validate_default=True)
OLD_NAMES = {"dryrun": "offline", "run": "online"}  # that WANDB_MODE may still have


def _mode(given: object) -> object:
    """The mode that was given, else WANDB_MODE of the environment, else offline."""
    if given is not None:
        return given
    mode = os.environ.get("WANDB_MODE") or "offline"
    return OLD_NAMES.get(mode, mode)


def _project(given: object) -> object:
    return given if given is not None else os.environ.get("WANDB_PROJECT") or "sae_dist"


@frozen
class WandbConfig:
    """Tracking in Weights & Biases; `offline` writes under the run's folder and `wandb sync` uploads it later.

    `mode` and `project` are never null: where null is given, the environment says which.
    """

    # offline, online or disabled; null: WANDB_MODE of the environment, else offline
    mode: Annotated[Literal["offline", "online", "disabled"], BeforeValidator(_mode)] = OF_ENVIRONMENT
    project: Annotated[str, BeforeValidator(_project)] = OF_ENVIRONMENT  # null: WANDB_PROJECT, else sae_dist
    entity: str | None = None
    group: str | None = None


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
        with naming(self._path):
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


def _training_line(path: Path, line: bytes) -> dict[str, Any] | None:
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


class WandbMirror:
    """A Log that feeds W&B, which lives in a process of its own: whatever it does there, it cannot touch the run.

    W&B dead, slow, hung or unreachable costs one warning, when it happens. The queue to it is bounded; what does not
    fit is counted and left out, since metrics.jsonl has it all.
    """

    def __init__(self, config: WandbConfig, *, out: Path, name: str, run_config: Mapping[str, Any]) -> None:
        settings = {
            "mode": config.mode, "project": config.project, "entity": config.entity, "group": config.group,
            "dir": str(out), "name": name, "config": dict(run_config),
        }  # fmt: skip
        self._lost, self._ending, self._told = 0, False, False
        self._said = out / "wandb.log"
        with self._said.open("ab") as errors:
            self._said_before = errors.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from sae_dist import monitor; monitor.serve_wandb()"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
                start_new_session=True,  # Ctrl-C is for the run, which then hands over what is left
            )  # fmt: skip
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=10_000)
        self._queue.put(settings)
        self._thread = threading.Thread(target=self._feed, name="wandb-mirror", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="wandb-watch", daemon=True).start()

    def __call__(self, step: int, figures: Mapping[str, Any]) -> None:
        try:
            self._queue.put_nowait({"step": step, **figures})
        except queue.Full:
            self._lost += 1

    def close(self, timeout_s: float = 20.0) -> None:
        """Hands over what is queued and ends the process, after `timeout_s` at most."""
        deadline, self._ending = time.monotonic() + timeout_s, True
        try:
            self._queue.put(None, timeout=timeout_s)
            self._thread.join(max(deadline - time.monotonic(), 0))
            code = self._process.wait(max(deadline - time.monotonic(), 0.1))
        except (queue.Full, subprocess.TimeoutExpired):
            self._process.kill()
            code = self._process.wait()
        if (code or self._lost) and not self._told:
            logger.warning("W&B did not get everything (see %s); metrics.jsonl has all", self._said)

    def _watch(self) -> None:
        """Says at once that W&B has ended while the run goes on: without a key it does so in its first seconds."""
        code = self._process.wait()
        if not self._ending:
            self._told = True
            with self._said.open("rb") as file:
                file.seek(self._said_before)
                said = file.read().decode(errors="replace").split("\n")
            reason = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")
            logger.warning(
                "W&B has ended (%s); the run goes on without it, and metrics.jsonl has all. Use wandb.mode=offline or "
                "disabled where it is not wanted; %s has more", reason, self._said,
            )  # fmt: skip

    def _feed(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            while (item := self._queue.get()) is not None:
                pipe.write(json.dumps(item).encode() + b"\n")
                pipe.flush()
            return
        while self._queue.get() is not None:  # nobody listens any more
            self._lost += 1


def serve_wandb() -> None:
    """The mirror's process: settings and then figures, a JSON object a line on standard input, until it ends.

    What a key `alert`, or one that ends in /alert, says is sent as a W&B alert too: mail or Slack, as the user set it.
    """
    import wandb

    settings = wandb.Settings(init_timeout=60, silent=True)
    run = wandb.init(**json.loads(sys.stdin.readline()), settings=settings)
    run.define_metric("*", step_metric="tokens")  # not W&B's own step: a resumed run may log one again
    for line in sys.stdin:
        figures = json.loads(line)
        run.log(figures)
        for key in figures:
            if key.rpartition("/")[2] == "alert":
                run.alert(title=f"{run.name}: step {figures['step']}", text=str(figures[key]), level="WARN")
    run.finish()


def tee(*logs: Log) -> Log:
    """One Log that feeds several."""

    def log(step: int, figures: Mapping[str, Any]) -> None:
        for each in logs:
            each(step, figures)

    return log
