"""What a run says while it works: metrics.jsonl is the truth, W&B a mirror that cannot hurt."""

import contextlib
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
from typing import Any, Literal

from sae_dist.config import frozen

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, Any]], None]  # (step, figures)


@frozen
class WandbConfig:
    """Tracking in Weights & Biases; `offline` writes under the run's folder and `wandb sync` uploads it later."""

    mode: Literal["offline", "online", "disabled"] = "offline"  # offline, online or disabled
    project: str = "sae_dist"
    entity: str | None = None
    group: str | None = None


class JsonLines:
    """A Log that appends one object a line and flushes it: a killed run keeps all but its last line.

    Several processes may append to one file. Lines of a `phase` other than training's have no step, only the phase.
    """

    def __init__(self, path: Path, *, phase: str = "train") -> None:
        self._phase = phase
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if not _ends_a_line(path):
            self._file.write(b"\n")  # after the line that a kill cut short

    def __call__(self, step: int, figures: Mapping[str, Any]) -> None:
        place = {"step": step} if self._phase == "train" else {"phase": self._phase}
        entry = {**place, "time": round(time.time(), 3), **figures}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()

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
    by_step: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the one line that a kill cut short
            if "step" in entry:
                by_step[entry["step"]] = entry
    return [by_step[step] for step in sorted(by_step)]


def newest_metrics(path: Path) -> dict[str, Any]:
    """The last whole training line of metrics.jsonl, empty when there is none; reads the end of the file only."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 262_144, 0))  # other phases write there too
        lines = file.read().split(b"\n")
    for line in reversed(lines):  # the last one may still be in the writing, or cut short by a kill
        with contextlib.suppress(ValueError):
            if "step" in (entry := json.loads(line)):
                return entry
    return {}


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all: readers never see half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_whole` of JSON; a figure that is not finite is a ValueError, not bad JSON."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


class WandbMirror:
    """A Log that feeds W&B, which lives in a process of its own: whatever it does there, it cannot touch the run.

    W&B dead, slow, hung or unreachable costs one warning. The queue to it is bounded; what does not fit is counted and
    left out, since metrics.jsonl has it all.
    """

    def __init__(self, config: WandbConfig, *, out: Path, name: str, run_config: Mapping[str, Any]) -> None:
        settings = {
            "mode": config.mode, "project": config.project, "entity": config.entity, "group": config.group,
            "dir": str(out), "name": name, "config": dict(run_config),
        }  # fmt: skip
        self._lost = 0
        with (out / "wandb.log").open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from sae_dist import monitor; monitor.serve_wandb()"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
                start_new_session=True,  # Ctrl-C is for the run, which then hands over what is left
            )  # fmt: skip
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=10_000)
        self._queue.put(settings)
        self._thread = threading.Thread(target=self._feed, name="wandb-mirror", daemon=True)
        self._thread.start()

    def __call__(self, step: int, figures: Mapping[str, Any]) -> None:
        try:
            self._queue.put_nowait({"step": step, **figures})
        except queue.Full:
            self._lost += 1

    def close(self, timeout_s: float = 20.0) -> None:
        """Hands over what is queued and ends the process, after `timeout_s` at most."""
        deadline = time.monotonic() + timeout_s
        try:
            self._queue.put(None, timeout=timeout_s)
            self._thread.join(max(deadline - time.monotonic(), 0))
            code = self._process.wait(max(deadline - time.monotonic(), 0.1))
        except (queue.Full, subprocess.TimeoutExpired):
            self._process.kill()
            code = self._process.wait()
        if code or self._lost:
            logger.warning("W&B did not get everything (see wandb.log in the run's folder); metrics.jsonl has all")

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
