"""An actor does not outlive the Ray node that started it.

A node that was cut off and declared dead ends itself, and leaves its actors. Ray's own check is for processes that the
first process of the machine inherits, which is not who inherits them in many containers: they would keep their memory
and their GPU, out of everybody's reach.
"""

import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

EVERY_S = 2.0


def exit_with_parent() -> None:
    """From now on this process ends, at once, within two seconds of the one that started it."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="orphan", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY_S)
    logger.error("the Ray node that started this process (pid %d) is gone; it ends too", parent)
    os._exit(1)
