"""Alerts to an address of the user's: JSON by POST, behind a bounded queue, so that nobody waits for it."""

import json
import logging
import queue
import threading
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

WAITING = 100  # alerts
ANSWER_S = 10.0


class Webhook:
    """Posts in a thread of its own. What is lost is counted and said once; the log and metrics.jsonl have all alerts.

    The address is a secret, since whoever knows it may post: only its host is ever shown.
    """

    def __init__(self, url: str) -> None:
        self._url, self._host = url, urlsplit(url).hostname
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(maxsize=WAITING)
        self.lost, self._counting = 0, threading.Lock()  # by the thread and by who posts
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def post(self, alert: Mapping[str, Any]) -> None:
        try:
            self._queue.put_nowait(alert)
        except queue.Full:
            self._lose(f"{WAITING} alerts wait for an answer")

    def close(self) -> None:
        """Lets what waits be posted, for as long as one answer may take."""
        try:
            self._queue.put(None, timeout=ANSWER_S)
        except queue.Full:
            return
        self._thread.join(ANSWER_S)

    def _work(self) -> None:
        while (alert := self._queue.get()) is not None:
            try:
                self._send(alert)
            except (OSError, HTTPException) as error:  # an URLError is an OSError
                reason = getattr(error, "reason", error)
                self._lose(f"{type(error).__name__}: {reason}" if str(reason) else type(error).__name__)

    def _send(self, alert: Mapping[str, Any]) -> None:
        request = urllib.request.Request(
            self._url, json.dumps(alert).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S):
            pass

    def _lose(self, why: str) -> None:
        with self._counting:
            self.lost += 1
            is_first = self.lost == 1
        if is_first:
            logger.warning(
                "an alert did not reach alerts.webhook at %s (%s); metrics.jsonl has all alerts", self._host, why
            )
