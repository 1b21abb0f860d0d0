"""A tracker in a process of its own, which follows metrics.jsonl: it cannot slow, stop or change the run.

Nothing waits for it. What lies between a run and its trackers is the file, which is never full before the run itself
is: a slow tracker is behind, a dead one costs one warning, and `sae-dist sync` makes up for both.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sae_dist.monitor.config import WandbConfig
from sae_dist.monitor.metrics import Follower
from sae_dist.monitor.tracked import TrackedRun
from sae_dist.monitor.tracker import History, Tracker

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
CLOSE_S = 30.0  # for a tracker to take what is left when the run is over
NICE = 5  # a step comes first where processors are scarce


class TrackerProcess:
    """Starts a tracker on metrics.jsonl; close it. `kind` is wandb or tensorboard, `options` are the tracker's own."""

    def __init__(self, kind: str, options: Mapping[str, Any], *, metrics: Path, runs: Sequence[TrackedRun]) -> None:
        self._kind, self._ending, self._told = kind, False, False
        self._said = metrics.parent / f"{kind}.log"
        with self._said.open("ab") as errors:
            self._said_before = errors.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sae_dist.monitor.tracker_process"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
                start_new_session=True,  # Ctrl-C is for the run, which then lets it take what is left
            )  # fmt: skip
        order = {"kind": kind, "options": options, "metrics": str(metrics), "runs": [run._asdict() for run in runs]}
        self._teller = threading.Thread(target=self._tell, args=(order,), name=f"{kind}-tell", daemon=True)
        self._teller.start()
        threading.Thread(target=self._watch, name=f"{kind}-watch", daemon=True).start()

    def close(self) -> None:
        """Lets it take what is left; says when it did not."""
        if (reason := self.finish(CLOSE_S)) and not self._told:
            logger.warning("%s did not get everything (%s); %s", self._kind, reason, self._cure)

    def finish(self, timeout_s: float) -> str:
        """Waits until it has everything, `timeout_s` at most, and ends it; why it has not, empty where it has."""
        deadline, self._ending = time.monotonic() + timeout_s, True
        self._teller.join(timeout_s)
        if self._teller.is_alive():  # it does not even listen, and closing what is being written to would wait as well
            self._process.kill()
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead, or was not told everything
            self._process.stdin.close()
        try:
            code = self._process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"it was not done after {timeout_s:.0f} s"
        return self._reason(code) if code else ""

    @property
    def _cure(self) -> str:
        return f"metrics.jsonl has all, and `sae-dist sync {self._said.parent}` sends it; {self._said} has more"

    def _tell(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def _watch(self) -> None:
        """Says at once that it has ended while the run goes on: without a key W&B does so in its first seconds."""
        code = self._process.wait()
        if not self._ending:
            self._told = True
            logger.warning(
                "%s has ended (%s); the run goes on without it. %s", self._kind, self._reason(code), self._cure
            )

    def _reason(self, code: int) -> str:
        with self._said.open("rb") as file:
            file.seek(self._said_before)
            said = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")


def wandb_options(config: WandbConfig, out: Path) -> dict[str, Any]:
    """What WandbTracker is told."""
    return {"folder": str(out), "mode": config.mode, "project": config.project, "entity": config.entity}


def main() -> None:
    """The tracker's process: what it is to do on one line of standard input, whose end is that of the run."""
    order = json.loads(sys.stdin.readline())
    os.nice(NICE)
    runs = [TrackedRun(**run) for run in order["runs"]]
    tracker = _tracker(order["kind"], order["options"])
    history, follower, ended = History(runs, tracker), Follower(Path(order["metrics"])), threading.Event()
    before = list[dict[str, Any]]()
    while part := follower.read():
        before += part
    history.begin(before)
    tracker.flush()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    last = False
    while not last:
        last = ended.wait(LOOK_EVERY_S)  # before the last look: what was said until then counts
        while part := follower.read():
            history.go_on(part)
            tracker.flush()
    tracker.close()


def _tracker(kind: str, options: Mapping[str, Any]) -> Tracker:
    if kind == "wandb":
        from sae_dist.monitor.wandb_tracker import WandbTracker  # each loads what the others do without

        return WandbTracker(**options)
    from sae_dist.monitor.tensorboard import TensorboardTracker

    return TensorboardTracker(Path(options["folder"]))


if __name__ == "__main__":
    main()
