"""A thread that follows metrics.jsonl and raises alerts: in the log, in metrics.jsonl, and by webhook."""

import logging
import shutil
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from sae_dist.monitor.alerts import Alert, Episodes, decide
from sae_dist.monitor.config import AlertsConfig
from sae_dist.monitor.metrics import Follower, JsonLines
from sae_dist.monitor.webhook import Webhook

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
KEPT_S = 7200.0  # of lines, and more where an alert looks back further
KEPT_LINES = 5_000


class Watch:
    """Alerts of one attempt, which begins now. Close it."""

    def __init__(self, config: AlertsConfig, out: Path) -> None:
        self._config, self._out = config, out
        self._webhook = Webhook(config.webhook) if config.webhook is not None else None
        self._follower, self._episodes = Follower(out / "metrics.jsonl", from_end=True), Episodes()
        self._lines = JsonLines(out / "metrics.jsonl", phase="alert")
        self._start: dict[str, Any] = {"phase": "start", "time": time.time()}
        self._history: deque[dict[str, Any]] = deque(maxlen=KEPT_LINES)
        self._unwritten: deque[Alert] = deque(maxlen=KEPT_LINES)  # raised, but not yet in metrics.jsonl
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Looks once more: the last line may hold an alert."""
        self._ending.set()
        self._thread.join()
        self._lines.close()
        if self._webhook is not None:
            self._webhook.close()

    def _work(self) -> None:
        last = failing = False
        while not last:
            last = self._ending.wait(LOOK_EVERY_S)
            try:
                self._look(last=last)
                failing = False
            except (OSError, ValueError) as error:  # a full disk, or a line that somebody has damaged
                if not failing:
                    logger.warning("alerts are held up: %s; looking again every %.0f s", error, LOOK_EVERY_S)
                failing = True

    def _look(self, *, last: bool) -> None:
        self._read()
        self._raise(time.time())
        if last:
            self._read()  # what was raised just now

    def _read(self) -> None:
        """Takes in new lines; an alert in one goes to the webhook."""
        while part := self._follower.read():
            for entry in part:
                self._pass_on(entry)
                if entry.get("phase") == "start":
                    self._start = entry
                elif entry.get("phase") in (None, "harvest"):
                    self._history.append(entry)

    def _raise(self, now: float) -> None:
        config, usage = self._config, shutil.disk_usage(self._out)
        kept_s = max(KEPT_S, *(2 * (given or 0) for given in (config.starved_s, config.no_commit_s, config.stalled_s)))
        while self._history and now - self._history[0]["time"] > kept_s:
            self._history.popleft()
        alerts = decide(
            [self._start, *self._history], config, now=now, disk_free=usage.free / max(usage.total, 1)
        )  # fmt: skip
        for alert in self._episodes.new(alerts):
            logger.error("ALERT: %s", alert.text)
            self._unwritten.append(alert)
        while self._unwritten:
            alert = self._unwritten[0]
            self._lines(0, {"name": alert.name, "alert": alert.text})
            self._unwritten.popleft()

    def _pass_on(self, entry: dict[str, Any]) -> None:
        """To the webhook what any line says under `alert`, or under a key that ends in /alert."""
        for key, text in entry.items():
            prefix, _, figure = key.rpartition("/")
            if figure == "alert" and self._webhook is not None:
                told = {"run": self._out.name, "text": f"{self._out.name}: {prefix}{': ' * bool(prefix)}{text}"}
                name = {"alert": entry["name"]} if "name" in entry else {}
                self._webhook.post(told | name | {"time": entry["time"], "step": entry.get("step")})
