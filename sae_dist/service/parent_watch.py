"""Ends an actor whose Ray node is gone.

A node that was cut off from its cluster ends itself and leaves its actors behind. Ray looks for orphans whose parent is
process 1, but in many containers another process inherits them: they would keep their memory and their GPU.
"""

import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

EVERY_S = 2.0


def exit_with_parent() -> None:
    """Makes this process exit within two seconds after its parent."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="orphan", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY_S)
    logger.error("the Ray node that started this process (pid %d) is gone; it ends too", parent)
    os._exit(1)
