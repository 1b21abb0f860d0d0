"""Does a job, where it runs: a command of ours, again after it was preempted or died, a stated number of times.

    python -m sae_dist.service.submit.attempts --tries=10 --out=/shared/runs/mine train store=... out=/shared/runs/mine

Exit codes are the command's. 0, 2 and 3 are final. After a request to stop it is 75, and nothing is tried again.
"""

import argparse
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sae_dist
from sae_dist.exit_codes import BAD_INPUT, DONE, SOME_FAILED, STOPPED
from sae_dist.service.run_folder import is_claimed
from sae_dist.service.signals import on_signals

logger = logging.getLogger(__name__)

FINAL = (DONE, BAD_INPUT, SOME_FAILED)
LOOK_S = 0.5
PAUSE_S = 10.0  # before a command is tried again: what ended it may still be at work
CLAIM_S = 600.0  # that an earlier attempt may take to let go of the run's folder, as when its cluster lost its head


class Attempts:
    """One job's attempts in this process."""

    def __init__(self, command: Sequence[str], *, out: str, tries: int) -> None:
        self._command, self._out, self.tries = list(command), Path(out), tries
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = False  # whether there was a request to stop

    def run(self, on_stop: Callable[[], None] = lambda: None) -> int:
        """Tries until the command is done, refused or asked to stop; its exit code. `on_stop`: at every request."""

        def hear(_: str) -> None:
            self.stopped = True
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)
            on_stop()

        on_signals(hear)
        code = STOPPED
        for number in range(1, self.tries + 1):
            self._wait(CLAIM_S, lambda: is_claimed(self._out), f"out={self._out} is still held by an earlier attempt")
            if self.stopped:
                return STOPPED
            logger.info("sae-dist %s, try %d of %d", sae_dist.__version__, number, self.tries)
            code = self._once()
            if code in FINAL:
                return code
            if self.stopped:
                return STOPPED
            logger.warning("the command %s (exit code %d)", "stopped early" if code == STOPPED else "died", code)
            if number < self.tries:
                self._wait(PAUSE_S, lambda: True, "trying again")
        return code

    def _once(self) -> int:
        self._process = subprocess.Popen([sys.executable, "-m", "sae_dist", *self._command])
        if self.stopped:  # a signal between the last look and now
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def _wait(self, seconds: float, still: Callable[[], bool], why: str) -> None:
        """Waits while it is `still` so, for so many seconds at most, or for a request to stop."""
        until, said = time.monotonic() + seconds, False
        while not self.stopped and time.monotonic() < until and still():
            if not said:
                logger.info("%s; waiting for up to %.0f s", why, seconds)
                said = True
            time.sleep(LOOK_S)


def parse(argv: Sequence[str] | None = None) -> Attempts:
    """The attempts that the arguments of this process describe."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="python -m sae_dist.service.submit.attempts")
    parser.add_argument("--tries", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    return Attempts(given.command, out=given.out, tries=given.tries)


if __name__ == "__main__":
    sys.exit(parse().run())
