"""Signals that ask to stop (SIGTERM, Ctrl-C, SIGHUP of a closed terminal), checked between two steps of the driver.

An exception raised by a signal handler could end Ray's own code anywhere, which Ray does not survive.
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
    """Whether a signal asked to stop since `catch_signals`."""

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
        """Records a signal; a second Ctrl-C raises KeyboardInterrupt at once."""
        if self._heard is None:
            self._heard, self._heard_at = name, time.monotonic()
        elif name == "SIGINT" and time.monotonic() - self._heard_at > SAME_REQUEST_S:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turns signals into a StopRequest for as long as the context lasts."""
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
    """Calls `hear` with the name of each of these signals from now on; returns the previous handlers.

    SIGHUP stays ignored where it is (nohup). Signals that were blocked when this process started are unblocked:
    launch/slurm.sbatch blocks them for Ray.
    """

    def handler(number: int, _: object) -> None:
        _discard_output_to_closed_files()
        hear(signal.Signals(number).name)

    wanted = [one for one in requests if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    return before


def _discard_output_to_closed_files() -> None:
    """Redirects output to a closed terminal or pipe to /dev/null: an error on writing would interrupt the saving."""
    for descriptor in (1, 2):
        looked = select.poll()
        looked.register(descriptor, 0)
        if any(seen & (select.POLLHUP | select.POLLERR) for _, seen in looked.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
