"""What a run says while it works: metrics.jsonl is the truth, W&B a mirror that cannot hurt."""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from sae_dist.config import frozen

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]  # (step, figures)


@frozen
class WandbConfig:
    """Tracking in Weights & Biases; `offline` writes under the run's folder and `wandb sync` uploads it later."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "sae_dist"
    entity: str | None = None
    group: str | None = None


class JsonLines:
    """A Log that appends one object a line and flushes it: a killed run keeps all but its last line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order of steps; a step that was done again counts as done last."""
    by_step: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the one line that a kill cut short
            by_step[entry["step"]] = entry
    return [by_step[step] for step in sorted(by_step)]


def newest_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl, empty when there is none; reads the end of the file only."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 16_384, 0))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line end is still being written
    return json.loads(lines[-1]) if lines else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


class WandbMirror:
    """A Log that feeds W&B from a thread of its own: a dead, slow or unreachable W&B costs a warning, never the run.

    The queue is bounded; what does not fit is counted and left out, since metrics.jsonl has it all.
    """

    def __init__(self, config: WandbConfig, *, out: Path, name: str, run_config: Mapping[str, Any]) -> None:
        self.dropped = 0
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(maxsize=10_000)
        self._arguments = {
            "mode": config.mode, "project": config.project, "entity": config.entity, "group": config.group,
            "dir": str(out), "name": name, "config": dict(run_config),
        }  # fmt: skip
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._thread.start()

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        try:
            self._queue.put_nowait((step, dict(figures)))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 10.0) -> None:
        """Hands over what is queued, waiting `timeout_s` at most."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            self.dropped += self._queue.qsize()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self.dropped:
            logger.warning("W&B lacks %d entries; metrics.jsonl has all", self.dropped + self._queue.qsize())

    def _work(self) -> None:
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            import wandb

            run = wandb.init(**self._arguments, settings=wandb.Settings(init_timeout=60))
            run.define_metric(
                "*", step_metric="tokens"
            )  # a resumed run may log a step again: x is tokens, not W&B's step
            while (item := self._queue.get()) is not None:
                step, figures = item
                run.log({"step": step, **figures})
            run.finish()
        except BaseException as error:  # noqa: BLE001  whatever W&B does, the run goes on; said once, below
            logger.warning("W&B stopped (%s: %s); the run goes on, metrics.jsonl has all", type(error).__name__, error)
            while self._queue.get() is not None:
                self.dropped += 1


def tee(*logs: Log) -> Log:
    """One Log that feeds several."""

    def log(step: int, figures: Mapping[str, float]) -> None:
        for each in logs:
            each(step, figures)

    return log
