"""Heartbeats: once a second every rank writes its status to the store of the rendezvous.

A thread writes it, so a rank that waits for others, for rows or for storage still has a heartbeat; one without is dead,
stopped or disconnected. Readers (the driver, or a rank whose peers are gone) measure silence by their own clock.
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
START_S = 300.0  # allowed before the first heartbeat of a rank
SLOW = 1.5  # times the median work of the others: a straggler
DONE = "done"  # the phase of a rank that has left normally
WORK_S = 10.0  # the interval over which work is compared


class RankStatus(NamedTuple):
    """The last status of a rank."""

    rank: int
    host: str
    pid: int
    number: int  # counts heartbeats
    step: int  # steps done
    phase: str  # connecting, reading, training, saving, done
    exchange_s: float  # seconds of exchanges with other ranks so far, waiting included

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid}), last at step {self.step} ({self.phase})"


class Heartbeat:
    """Writes this rank's heartbeats until it is closed. `set_phase` only stores values; the thread writes them."""

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
        """Writes the phase DONE, after which silence of this rank is normal."""
        self._end.set()
        self._thread.join(timeout=2 * EVERY_S)
        self._phase = DONE
        try:
            self._say()
        except RuntimeError:  # the server of the store has left: nobody reads
            return

    def close(self) -> None:
        self._end.set()
        self._thread.join(timeout=2 * EVERY_S)

    def _speak(self) -> None:
        while not self._end.wait(EVERY_S):
            try:
                self._say()
            except RuntimeError:  # the server of the store is gone; the next exchange will fail
                return

    def _say(self) -> None:
        self._number += 1
        status = RankStatus(
            self._rank, socket.gethostname(), os.getpid(), self._number, self._step, self._phase, self.exchange_s()
        )
        self._store.set(f"heartbeat/{self._rank}", json.dumps(status))


class HeartbeatMonitor:
    """The heartbeats of all ranks, as of the last `poll`."""

    def __init__(self, store: Store, world: int) -> None:
        self._store, self._world, self._ranks = store, world, range(world)
        self._began = time.monotonic()
        self.statuses: dict[int, RankStatus] = {}
        self._heard: dict[int, float] = {}
        self._compared: dict[int, RankStatus] = {}
        self._compared_at = self._began

    def poll(self) -> None:
        """Reads the last status of every rank; RuntimeError where the store is gone."""
        now = time.monotonic()
        for rank in self._ranks:
            if not self._store.check([f"heartbeat/{rank}"]):
                continue
            status = RankStatus(*json.loads(self._store.get(f"heartbeat/{rank}")))
            if rank not in self.statuses or status.number != self.statuses[rank].number:
                self._heard[rank] = now
            self.statuses[rank] = status

    def describe(self, rank: int) -> str:
        """A rank's last status in words, else its number."""
        return str(self.statuses.get(rank, f"rank {rank}"))

    def silence_s(self, rank: int) -> float:
        """Seconds since a rank's last heartbeat; 0 for one that is done."""
        if rank in self.statuses and self.statuses[rank].phase == DONE:
            return 0.0
        return time.monotonic() - self._heard.get(rank, self._began)

    def silent(self, longer_than_s: float, *, among: Iterable[int] | None = None) -> str | None:
        """The ranks (`among` these) without a heartbeat for so long, in words; None where there is none.

        Ranks that are still starting have START_S.
        """
        ranks = self._ranks if among is None else sorted(among)
        limits = {rank: longer_than_s if rank in self.statuses else max(longer_than_s, START_S) for rank in ranks}
        missing = [rank for rank, limit in limits.items() if self.silence_s(rank) > limit]
        if not missing:
            return None
        told = [f"{self.statuses.get(rank, f'rank {rank}, never heard of,')} is silent" for rank in missing]
        return "; ".join(f"{who} for {self.silence_s(rank):.0f} s" for who, rank in zip(told, missing, strict=True))

    def stragglers(self) -> list[str]:
        """Ranks that others wait for, in words, compared over WORK_S or more."""
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
        """One line per rank, for status.json."""
        return {
            str(r): f"step {own.step}, {own.phase}, {own.host}, pid {own.pid}, heard {self.silence_s(r):.0f} s ago"
            for r, own in sorted(self.statuses.items())
        }


def missing_ranks(store: Store, world: int, *, patience_s: float = 4 * EVERY_S) -> str | None:
    """After a failed exchange: the ranks without heartbeats, in words; None where all have them."""
    listener = HeartbeatMonitor(store, world)
    try:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            listener.poll()
            time.sleep(EVERY_S / 2)
        return listener.silent(2.5 * EVERY_S)
    except RuntimeError:
        return "the process that served the rendezvous is gone"
