"""Which replica works on which unit, and how long nobody doubts it. No clock and no process in here: times are given.

A lease is renewed by every sign of life of its replica and ends with the unit's report, with the replica, or when
nothing was heard for `lease_s`. Every grant has an attempt number of its own, so that a report of an attempt that is
over is known as such. Which of two producers of a unit counts is not decided here but by the store, which takes one.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple


class UnitLease(NamedTuple):
    """One unit in the hands of one replica; times in seconds of the coordinator's monotonic clock."""

    attempt: int
    unit: int
    replica: int
    heard: float


class UnitLeases:
    """Units are pending, leased or over. Pending ones go out in order, those that came back first."""

    def __init__(self, todo: Sequence[int], *, lease_s: float) -> None:
        self._pending, self._lease_s = deque(todo), lease_s
        self._held: dict[int, UnitLease] = {}  # by attempt
        self._attempts = 0
        self.lost: Counter[int] = Counter()  # how often a unit came back
        self.expired = 0  # replicas of which nothing was heard for too long

    @property
    def pending(self) -> int:
        return len(self._pending)

    @property
    def leased(self) -> int:
        return len(self._held)

    @property
    def retried(self) -> int:
        """Times that a unit came back."""
        return self.lost.total()

    @property
    def left(self) -> int:
        """Units that are not over yet."""
        return len(self._pending) + len(self._held)

    @property
    def next_came_back(self) -> bool:
        """Whether the next unit to go out was out before."""
        return bool(self._pending) and self.lost[self._pending[0]] > 0

    def of(self, replica: int) -> list[UnitLease]:
        """What the replica holds, longest held first."""
        return [lease for lease in self._held.values() if lease.replica == replica]

    def grant(self, replica: int, now: float) -> UnitLease | None:
        """The next unit for the replica, None when none is pending."""
        if not self._pending:
            return None
        self._attempts += 1
        lease = UnitLease(self._attempts, self._pending.popleft(), replica, now)
        self._held[lease.attempt] = lease
        return lease

    def hear(self, replica: int, now: float) -> None:
        """A sign of life: all leases of the replica begin anew."""
        for lease in self.of(replica):
            self._held[lease.attempt] = lease._replace(heard=now)

    def finish(self, attempt: int) -> bool:
        """The attempt's unit is over; False when the lease was already taken from it: its report is late."""
        return self._held.pop(attempt, None) is not None

    def take_back(self, replica: int) -> list[int]:
        """Ends all leases of a replica that is gone; its units are the next to go out. Returns them."""
        lost = self.of(replica)
        for lease in reversed(lost):
            del self._held[lease.attempt]
            self._pending.appendleft(lease.unit)
        self.lost.update(lease.unit for lease in lost)
        return [lease.unit for lease in lost]

    def overdue(self, now: float) -> list[int]:
        """Replicas with a lease that was not renewed in time."""
        silent = {lease.replica for lease in self._held.values() if now - lease.heard > self._lease_s}
        self.expired += len(silent)
        return sorted(silent)
