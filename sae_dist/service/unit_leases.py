"""Which replica works on which unit. Pure: times are arguments.

A lease is renewed by every sign of life of its replica. It ends with the unit's report, with the replica, or `lease_s`
seconds after the last sign of life. Every grant has a new attempt number, so that late reports are recognised. When two
replicas write one unit, the store decides which copy counts.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple


class UnitLease(NamedTuple):
    """One unit that one replica works on; `heard` in seconds of the driver's monotonic clock."""

    attempt: int
    unit: int
    replica: int
    heard: float


class UnitLeases:
    """Units are pending, leased or done. Pending ones are granted in order, returned ones first."""

    def __init__(self, todo: Sequence[int], *, lease_s: float) -> None:
        self._pending, self._lease_s = deque(todo), lease_s
        self._held: dict[int, UnitLease] = {}  # by attempt
        self._attempts = 0
        self.lost: Counter[int] = Counter()  # by unit: how often it came back
        self.expired = 0  # replicas that were silent for too long

    @property
    def pending(self) -> int:
        return len(self._pending)

    @property
    def leased(self) -> int:
        return len(self._held)

    @property
    def retried(self) -> int:
        """How often a unit came back, over all units."""
        return self.lost.total()

    @property
    def left(self) -> int:
        """Units that are not done."""
        return len(self._pending) + len(self._held)

    @property
    def next_came_back(self) -> bool:
        """Whether the next unit was granted before."""
        return bool(self._pending) and self.lost[self._pending[0]] > 0

    def of(self, replica: int) -> list[UnitLease]:
        """The replica's leases, oldest first."""
        return [lease for lease in self._held.values() if lease.replica == replica]

    def grant(self, replica: int, now: float) -> UnitLease | None:
        """Leases the next unit to the replica; None when none is pending."""
        if not self._pending:
            return None
        self._attempts += 1
        lease = UnitLease(self._attempts, self._pending.popleft(), replica, now)
        self._held[lease.attempt] = lease
        return lease

    def hear(self, replica: int, now: float) -> None:
        """Renews all leases of the replica after a sign of life."""
        for lease in self.of(replica):
            self._held[lease.attempt] = lease._replace(heard=now)

    def finish(self, attempt: int) -> bool:
        """Marks the attempt's unit as done; False when its lease had already ended."""
        return self._held.pop(attempt, None) is not None

    def take_back(self, replica: int) -> list[int]:
        """Ends all leases of a dead replica and returns its units, which are the next to be granted."""
        lost = self.of(replica)
        for lease in reversed(lost):
            del self._held[lease.attempt]
            self._pending.appendleft(lease.unit)
        self.lost.update(lease.unit for lease in lost)
        return [lease.unit for lease in lost]

    def overdue(self, now: float) -> list[int]:
        """Replicas with an expired lease."""
        silent = {lease.replica for lease in self._held.values() if now - lease.heard > self._lease_s}
        self.expired += len(silent)
        return sorted(silent)
