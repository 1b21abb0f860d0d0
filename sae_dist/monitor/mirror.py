"""W&B as a mirror of the metrics, in a process of its own: whatever it does there, it cannot touch the run."""

import contextlib
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.monitor.config import WandbConfig

logger = logging.getLogger(__name__)


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
                [sys.executable, "-c", "from sae_dist.monitor import mirror; mirror.serve_wandb()"],
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
