"""Who works on which point, and what came of it: small records that are created once and never change.

    ledger/<point>/point.json           what the point is
    ledger/<point>/0001.taken.json      a driver took it, for its try number 1; the next try is number 2
    ledger/<point>/0001.ended.json      what came of that try
    ledger/drivers/<driver>/...         a driver's signs of life (shards/lease.py)

A record is created where none is, so of several drivers exactly one takes a try, and a try ends in exactly one way. A
driver that died ends no try: another one ends it as lost and takes the next. Had the first only slept, it finds its
try ended, and what it has to say counts no more: the number of a try is a fencing token. What it takes from then on is
its own: a driver is gone for good only when its process has surely ended, and silent only until it is heard again.
"""

import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field

from sae_dist.shards import lease, records
from sae_dist.shards.records import Count, Hash
from sae_dist.storage import Storage
from sae_dist.sweep.point import State

FOLDER = "ledger"
RECORD = re.compile(rf"{FOLDER}/([0-9a-z-]+)/(?:point|(\d{{4,}})\.(taken|ended))\.json")
# done and failed end a point; one whose pass was split, stopped or lost, or died, is tried again
Outcome = Literal["done", "failed", "split", "stopped", "lost", "died"]
T = TypeVar("T")


class Described(NamedTuple):
    """point.json."""

    overrides: dict[str, Any]


class Taken(NamedTuple):
    """0001.taken.json."""

    driver: Hash
    together: Count  # points that the pass of this try trains


class Ended(NamedTuple):
    """0001.ended.json."""

    by: Hash  # the driver
    outcome: Outcome
    seconds: Annotated[float, Field(ge=0)] | None = None
    cost: Annotated[float, Field(ge=0)] | None = None
    failure: str | None = None  # why, in one line
    stopped_at: Count | None = None  # steps, where the stopping rule ended a point early
    stopped_why: str | None = None


class Try(NamedTuple):
    """A try of a point that this driver has taken."""

    point: str
    number: int


class Ledger:
    """The records of a sweep as one of its drivers sees them, who has the name `driver`; `refresh` reads new ones."""

    def __init__(self, storage: Storage, driver: str = "0" * 32, *, ttl_s: float = lease.TTL_S) -> None:
        self.driver, self._storage, self._ttl_s = driver, storage, ttl_s
        self.points: dict[str, Described] = {}
        self._taken: dict[str, dict[int, Taken]] = defaultdict(dict)  # by point and number of the try
        self._ended: dict[str, dict[int, Ended]] = defaultdict(dict)
        self._gone: set[str] = set()  # drivers that have surely ended
        self._silences: dict[str, lease.Silence] = {}  # of drivers elsewhere

    def refresh(self) -> None:
        """Reads the records that came since the last time."""
        for entry in self._storage.list(f"{FOLDER}/"):
            if (found := RECORD.fullmatch(entry.key)) is None:
                continue
            point, number, kind = found.groups()
            if kind is None:
                self._read(Described, entry.key, self.points, point)
            elif kind == "taken":
                self._read(Taken, entry.key, self._taken[point], int(number))
            else:
                self._read(Ended, entry.key, self._ended[point], int(number))

    def add(self, point: str, overrides: Mapping[str, Any]) -> None:
        """Enters a point, unless it is there."""
        if point not in self.points:
            self._storage.create(f"{FOLDER}/{point}/point.json", records.seal({"overrides": dict(overrides)}))
            self.points[point] = Described(dict(overrides))

    def tries(self, point: str) -> int:
        """How often it was taken."""
        return max(self._taken[point], default=0)

    def ends(self, point: str) -> list[Ended]:
        """What came of its tries, in their order."""
        return [ended for _, ended in sorted(self._ended[point].items())]

    def state(self, point: str) -> State:
        """As the records say; a point is pending, too, while a driver has it who is gone."""
        number = self.tries(point)
        if not number:
            return "pending"
        if (ended := self._ended[point].get(number)) is None:
            return "pending" if self._is_gone(self._taken[point][number].driver) else "leased"
        return ended.outcome if ended.outcome in ("done", "failed") else "pending"

    def most(self, point: str) -> int | None:
        """How many points a pass may have that this one is in: half of one that was split. None: any number."""
        split = [number for number, ended in self._ended[point].items() if ended.outcome == "split"]
        return min((max(self._taken[point][number].together // 2, 1) for number in split), default=None)

    def take(self, point: str, *, together: int) -> Try | None:
        """A try of a point for this driver, to be trained in a pass of so many; None where another driver has it."""
        number = self.tries(point)
        if number and number not in self._ended[point]:
            if not self._is_gone(self._taken[point][number].driver):
                return None
            self.end(Try(point, number), "lost")
            if self.state(point) != "pending":  # it was not dead: it has just ended the try
                return None
        ours = Taken(self.driver, together)
        return Try(point, number + 1) if self._create(self._taken, Try(point, number + 1), "taken", ours) else None

    def end(
        self, taken: Try, outcome: Outcome, *, seconds: float | None = None, cost: float | None = None,
        failure: str | None = None, stopped_at: int | None = None, stopped_why: str | None = None,
    ) -> bool:  # fmt: skip
        """Says what came of a try; False where another driver has ended it, having taken this one for dead."""
        ended = Ended(self.driver, outcome, seconds, cost, failure, stopped_at, stopped_why)
        return self._create(self._ended, taken, "ended", ended)

    def counts(self, taken: Try) -> bool:
        """Whether a try of this driver is still under way for all others too."""
        return taken.number not in self._ended[taken.point]

    def _create(self, known: Mapping[str, dict[int, T]], taken: Try, kind: str, ours: T) -> bool:
        """Creates a record, and reads back which one is there: the answer to `create` may have been lost."""
        key = f"{FOLDER}/{taken.point}/{taken.number:04d}.{kind}.json"
        self._storage.create(key, records.seal(ours._asdict()))  # type: ignore[attr-defined]
        self._read(type(ours), key, known[taken.point], taken.number)
        return known[taken.point][taken.number] == ours

    def _read(self, kind: type[T], key: str, known: dict[Any, T], name: str | int) -> None:
        if name not in known:
            what = f"{self._storage.uri}/{key}"
            record = records.read(self._storage, key, what)
            known[name] = records.checked(kind, {k: v for k, v in record.items() if k != "digest"}, what)

    def _is_gone(self, driver: str) -> bool:
        """Whether another driver has ended or died; one on another machine counts as dead while it is silent."""
        if driver == self.driver:
            return False
        if driver in self._gone:
            return True
        place = _place(self._storage, driver)
        over = lease.is_over(place, 1, place.holder(1))
        if over is None:
            return self._is_silent(driver, place)
        if over:
            self._gone.add(driver)
        return over

    def _is_silent(self, driver: str, place: lease.LeasedPlace) -> bool:
        """Whether a driver has given no sign of life for `ttl_s`, as far as this one has looked."""
        if (silence := self._silences.get(driver)) is None:
            silence = self._silences[driver] = lease.Silence(place, 1, self._ttl_s)
        else:
            silence.look()
        return silence.too_long


@contextmanager
def driving(storage: Storage, *, ttl_s: float = lease.TTL_S) -> Iterator[Ledger]:
    """The ledger as a new driver sees it, who gives signs of life for as long as the context lasts."""
    driver = uuid.uuid4().hex
    place = _place(storage, driver)
    with lease.lease(storage, storage.uri, key=place.key, folder=place.folder, ttl_s=ttl_s):
        yield Ledger(storage, driver, ttl_s=ttl_s)


def _place(storage: Storage, driver: str) -> lease.LeasedPlace:
    return lease.LeasedPlace(storage, "out", f"{FOLDER}/drivers/{driver}")
