"""A request to stop, heard between two steps of the driver: SIGTERM, Ctrl-C, or a terminal that was closed (SIGHUP).

An exception out of a signal handler would go right through Ray's own code, which does not survive it.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sae_dist.config import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_S = 1.0  # a supervisor may signal a process and then its group: a second SIGINT that soon is the same


class StopRequest:
    """Whether there was a request to stop since `catch_signals`."""

    def __init__(self) -> None:
        self._heard: str | None = None
        self._heard_at = 0.0

    def made(self) -> bool:
        return self._heard is not None

    def check(self) -> None:
        """Raises `Stopped` once there was a request."""
        if self._heard is not None:
            raise Stopped(self._heard)

    def hear(self, name: str) -> None:
        """Takes in a signal. A second Ctrl-C does not wait for anything any more."""
        if self._heard is None:
            self._heard, self._heard_at = name, time.monotonic()
        elif name == "SIGINT" and time.monotonic() - self._heard_at > SAME_REQUEST_S:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turns signals into a request for as long as the context lasts."""
    request = StopRequest()
    before = on_signals(request.hear)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_signals(
    hear: Callable[[str], None], requests: tuple[signal.Signals, ...] = STOP_SIGNALS
) -> dict[signal.Signals, Any]:
    """Calls `hear` with the name of each of these signals from now on; what handled them before.

    SIGHUP is left alone where it is ignored: that is what nohup is for. A signal that whoever started this process had
    blocked is let through: it is blocked for Ray (launch/slurm.sbatch).
    """

    def handler(number: int, _: object) -> None:
        _discard_output_to_closed_files()
        hear(signal.Signals(number).name)

    wanted = [one for one in requests if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    return before


def _discard_output_to_closed_files() -> None:
    """From now on what is said to a terminal or a pipe that was closed goes nowhere.

    Writing to it is an error, which would end the saving.
    """
    for descriptor in (1, 2):
        looked = select.poll()
        looked.register(descriptor, 0)
        if any(seen & (select.POLLHUP | select.POLLERR) for _, seen in looked.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
