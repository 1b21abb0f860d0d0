"""Something that is done again and again beside the run, in a thread of its own."""

import threading
from collections.abc import Callable


class Periodic:
    """Calls `act` now and every `every_s` seconds until it is closed; `act` raises nothing."""

    def __init__(self, act: Callable[[], object], *, every_s: float, name: str) -> None:
        self._act, self._every_s = act, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits for a call in progress; no other follows."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        self._act()
        while not self._ended.wait(self._every_s):
            self._act()
