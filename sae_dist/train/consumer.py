"""What a training reports to the producers of its store: the units it has read, and those it may read again.

The first bounds how far harvesting runs ahead, the second what retention may delete (shards/consumers.py).
"""

import logging
import re
import threading
from pathlib import Path

from sae_dist.config import digest
from sae_dist.shards import consumers
from sae_dist.storage import Storage, StorageError

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 2.0


def consumer_name(out: Path) -> str:
    """The name by which the store knows the training into `out`; the same at every start."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", out.name).strip("-")[:64] or "run"
    return f"{readable}-{digest(str(out))[:8]}"


class Consumer:
    """Reports changes to the store, at most every two seconds; with storage None it reports nothing.

    A thread reports, because the training may be waiting for rows that are made only after the report. A report that
    fails is a warning, since the next one includes it. Close it, or use `closing`.
    """

    def __init__(self, storage: Storage | None, name: str, *, taken: int) -> None:
        self._storage, self._name = storage, name
        self._position = consumers.ConsumerPosition(name, taken, 0)
        self._told: consumers.ConsumerPosition | None = None
        self._telling, self._end = threading.Lock(), threading.Event()
        self._report()  # before reading: producers must know that somebody reads
        self._thread = threading.Thread(target=self._keep, name="consumer", daemon=True)
        if storage is not None:
            self._thread.start()

    def take(self, units: int, *, starved_s: float = 0.0) -> None:
        """The first `units` units of the first epoch are read, and needed again only after rolling back.

        `starved_s`: seconds that the training has waited for rows so far.
        """
        now = self._position
        self._position = now._replace(taken=max(units, now.taken), starved_s=max(starved_s, now.starved_s))

    def save(self, units: int) -> None:
        """No checkpoint that the run may return to needs the first `units` units; reported at once."""
        now = self._position
        self._position = now._replace(saved=max(now.saved, min(units, now.taken)))
        self._report()

    def sign_off(self) -> None:
        """The training is done: producers neither keep units nor wait for it."""
        self.close()
        if self._storage is None:
            return
        try:
            consumers.sign_off(self._storage, self._name)
        except (StorageError, OSError) as error:
            logger.warning("the store does not let consumer %s sign off (%s)", self._name, error)

    def close(self) -> None:
        """Ends the reports; the last one stays in the store."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        while not self._end.wait(REPORT_EVERY_S):
            self._report()

    def _report(self) -> None:
        with self._telling:
            position = self._position
            if self._storage is None or self._told == position:
                return
            try:
                consumers.report(self._storage, position)
                self._told = position
            except (StorageError, OSError) as error:
                logger.warning("the store does not take the report of consumer %s (%s)", self._name, error)
