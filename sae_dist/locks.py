"""A lock between processes: a file that the kernel unlocks however its holder ends."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def file_lock(path: Path, *, waiting: str = "") -> Iterator[None]:
    """Holds the lock file at `path`, which is made where it is missing; waits while another process holds it.

    waiting: logged once if there is something to wait for; empty: nothing is logged
    """
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                logger.warning("%s (lock %s)", waiting, path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
