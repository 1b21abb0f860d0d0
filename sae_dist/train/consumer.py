"""What a training tells the producers of its store: how far it is, and from where it would begin again.

Harvesting ahead of it is bounded by the first, deleting behind it by the second (shards/credits.py).
"""

import logging
import re
import time
from pathlib import Path

from sae_dist.config import digest
from sae_dist.shards import credits
from sae_dist.storage import Storage, StorageError

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 2.0


def consumer_name(out: Path) -> str:
    """The name under which the training into `out` is known to its store: the same at every start."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", out.name).strip("-")[:64] or "run"
    return f"{readable}-{digest(str(out))[:8]}"


class Consumer:
    """Reports to the store whenever something changed, every two seconds at most; `None` as storage reports nothing.

    A report that fails costs a warning: the next one says the same and more.
    """

    def __init__(self, storage: Storage | None, name: str, *, taken: int, saved: int) -> None:
        self._storage, self._name = storage, name
        self._taken, self._saved = max(taken, saved), saved
        self._starved_s = 0.0
        self._told: tuple[int, int, float] | None = None
        self._told_at = -REPORT_EVERY_S
        self._report()  # before anything is read: a producer must not take the store for one that nobody reads

    def take(self, units: int, *, starved_s: float = 0.0) -> None:
        """The first `units` units of the first pass are not needed any more, unless a checkpoint is gone back to.

        `starved_s`: seconds that the training has waited for rows so far.
        """
        self._taken, self._starved_s = max(units, self._taken), max(starved_s, self._starved_s)
        if time.monotonic() - self._told_at >= REPORT_EVERY_S:
            self._report()

    def save(self, units: int) -> None:
        """The oldest checkpoint that may be gone back to is through with the first `units` units."""
        self._saved = max(self._saved, min(units, self._taken))
        self._report()

    def sign_off(self) -> None:
        """Everything is trained: nothing is kept for this training and nobody waits for it."""
        if self._storage is not None:
            credits.sign_off(self._storage, self._name)

    def _report(self) -> None:
        now = (self._taken, self._saved, round(self._starved_s, 3))
        if self._storage is None or self._told == now:
            return
        self._told_at = time.monotonic()
        try:
            credits.report(self._storage, credits.Position(self._name, *now))
            self._told = now
        except (StorageError, OSError) as error:
            logger.warning("the store does not take the report of consumer %s (%s)", self._name, error)
