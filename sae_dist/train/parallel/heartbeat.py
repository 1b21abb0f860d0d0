"""Who is alive, and where: every rank says once a second what it does, in the store where the ranks met.

A thread of its own says it, so a rank that waits for others, for rows or for the storage is heard all the same, and one
that is not heard is dead, stopped or cut off. Whoever reads (the driver, or a rank whose peers are gone) measures
silence by its own clock.
"""

import json
import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

EVERY_S = 1.0
START_S = 300.0  # until a rank is heard for the first time
SLOW = 1.5  # times the work of the median of the others: a straggler
DONE = "done"  # the phase of a rank that has left in peace
WORK_S = 10.0  # over which work is compared


class RankStatus(NamedTuple):
    """What a rank said last."""

    rank: int
    host: str
    pid: int
    number: int  # how often it has said something
    step: int  # steps done
    phase: str  # connecting, reading, training, saving, done
    exchange_s: float  # waiting for other ranks and talking to them, so far

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid}), last at step {self.step} ({self.phase})"


class Heartbeat:
    """This rank's voice; close it. `set_phase` costs nothing: the thread picks up what was said last."""

    def __init__(self, store: Store, rank: int, exchange_s: Callable[[], float] = lambda: 0.0) -> None:
        self._store, self._rank, self.exchange_s = store, rank, exchange_s
        self._step, self._phase, self._number = 0, "connecting", 0
        self._end = threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._speak, name="heartbeat", daemon=True)
        self._thread.start()

    def set_phase(self, step: int, phase: str) -> None:
        self._step, self._phase = step, phase

    def done(self) -> None:
        """The last word: whoever listens does not miss this rank from now on."""
        self._end.set()
        self._thread.join(timeout=2 * EVERY_S)
        self._phase = DONE
        try:
            self._say()
        except RuntimeError:  # who served the store has left before: nobody listens any more
            return

    def close(self) -> None:
        self._end.set()
        self._thread.join(timeout=2 * EVERY_S)

    def _speak(self) -> None:
        while not self._end.wait(EVERY_S):
            try:
                self._say()
            except RuntimeError:  # who served the store is gone; the next exchange will tell this rank what that means
                return

    def _say(self) -> None:
        self._number += 1
        status = RankStatus(
            self._rank, socket.gethostname(), os.getpid(), self._number, self._step, self._phase, self.exchange_s()
        )
        self._store.set(f"heartbeat/{self._rank}", json.dumps(status))


class HeartbeatMonitor:
    """What is heard of all ranks. Call `poll` now and then; the rest tells what came of it."""

    def __init__(self, store: Store, world: int) -> None:
        self._store, self._world, self._ranks = store, world, range(world)
        self._began = time.monotonic()
        self.statuses: dict[int, RankStatus] = {}
        self._heard: dict[int, float] = {}
        self._compared: dict[int, RankStatus] = {}
        self._compared_at = self._began

    def poll(self) -> None:
        """Reads what every rank said last; RuntimeError when the store is gone."""
        now = time.monotonic()
        for rank in self._ranks:
            if not self._store.check([f"heartbeat/{rank}"]):
                continue
            status = RankStatus(*json.loads(self._store.get(f"heartbeat/{rank}")))
            if rank not in self.statuses or status.number != self.statuses[rank].number:
                self._heard[rank] = now
            self.statuses[rank] = status

    def describe(self, rank: int) -> str:
        """A rank by what it said last, else by its number."""
        return str(self.statuses.get(rank, f"rank {rank}"))

    def silence_s(self, rank: int) -> float:
        """Seconds since something new was heard of a rank; 0 for one that is done."""
        if rank in self.statuses and self.statuses[rank].phase == DONE:
            return 0.0
        return time.monotonic() - self._heard.get(rank, self._began)

    def silent(self, longer_than_s: float, *, among: Iterable[int] | None = None) -> str | None:
        """Who (`among` these ranks) has not been heard of for so long, in words; None when everybody was.

        Starting may take longer.
        """
        ranks = self._ranks if among is None else sorted(among)
        limits = {rank: longer_than_s if rank in self.statuses else max(longer_than_s, START_S) for rank in ranks}
        missing = [rank for rank, limit in limits.items() if self.silence_s(rank) > limit]
        if not missing:
            return None
        told = [f"{self.statuses.get(rank, f'rank {rank}, never heard of,')} is silent" for rank in missing]
        return "; ".join(f"{who} for {self.silence_s(rank):.0f} s" for who, rank in zip(told, missing, strict=True))

    def stragglers(self) -> list[str]:
        """Ranks that others wait for, in words, compared over the last ten seconds or more."""
        seconds = time.monotonic() - self._compared_at
        if seconds < WORK_S or len(self.statuses) < self._world or self._world == 1:
            return []
        before, self._compared, self._compared_at = self._compared, dict(self.statuses), time.monotonic()
        if len(before) < self._world or any(self.statuses[r].step == before[r].step for r in before):
            return []
        work = {r: max(seconds - (self.statuses[r].exchange_s - before[r].exchange_s), 1e-3) for r in before}
        slow = []
        for rank, own in work.items():
            others = statistics.median(w for r, w in work.items() if r != rank)
            if own > SLOW * others:
                slow.append(
                    f"{self.statuses[rank]} is slow: it works {own / seconds:.0%} of the time, the others "
                    f"{others / seconds:.0%} and wait for it"
                )
        return slow

    def facts(self) -> dict[str, str]:
        """A line a rank, for status.json."""
        return {
            str(r): f"step {own.step}, {own.phase}, {own.host}, pid {own.pid}, heard {self.silence_s(r):.0f} s ago"
            for r, own in sorted(self.statuses.items())
        }


def missing_ranks(store: Store, world: int, *, patience_s: float = 4 * EVERY_S) -> str | None:
    """After an exchange failed: which ranks are not heard any more, in words; None when all still answer."""
    listener = HeartbeatMonitor(store, world)
    try:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            listener.poll()
            time.sleep(EVERY_S / 2)
        return listener.silent(2.5 * EVERY_S)
    except RuntimeError:
        return "the process that served the meeting point is gone"
