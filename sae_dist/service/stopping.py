"""A request to stop, heard between two steps of the driver.

An exception out of a signal handler would go right through Ray's own code, which does not survive it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sae_dist.config import Stopped


class StopRequest:
    """Whether SIGTERM or Ctrl-C has come since `listening`."""

    def __init__(self) -> None:
        self._heard: str | None = None

    def check(self) -> None:
        """Raises `Stopped` once there was a request."""
        if self._heard is not None:
            raise Stopped(self._heard)

    def hear(self, number: int, _: FrameType | None) -> None:
        """The signal handler; a second signal does not wait for anything any more."""
        if self._heard is not None:
            raise KeyboardInterrupt
        self._heard = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a request for as long as the context lasts."""
    request = StopRequest()
    before = {number: signal.signal(number, request.hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
