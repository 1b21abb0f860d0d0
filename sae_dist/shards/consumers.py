"""The positions of a store's consumers, and flow control of its producers.

A consumer writes to consumers/<name>.json how many units it has consumed, and how many at its last checkpoint.
Producers pause while the store is too far ahead of the slowest consumer. Retention deletes only what every consumer
had consumed at its last checkpoint.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field

from sae_dist.config import UserError
from sae_dist.shards import format, records
from sae_dist.shards.records import CorruptData, Count
from sae_dist.storage import Storage


class ConsumerPosition(NamedTuple):
    """Units of the first pass that a consumer has consumed (`Batch.units_done`): now, and at its last checkpoint.

    starved_s: seconds that it has waited for rows since its start
    """

    consumer: str
    taken: Count
    saved: Count
    starved_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


def report(storage: Storage, position: ConsumerPosition) -> None:
    """Registers the consumer or updates its position."""
    if not 0 <= position.saved <= position.taken:
        raise UserError(f"consumer={position.consumer}: saved={position.saved} is beyond taken={position.taken}")
    storage.write(_key(position.consumer), records.seal(position._asdict()))


def sign_off(storage: Storage, consumer: str) -> None:
    """Removes a consumer that is done: nothing is kept for it and nobody waits for it."""
    storage.delete(_key(consumer))


def positions(storage: Storage) -> list[ConsumerPosition]:
    """Every registered consumer."""
    found = []
    for entry in storage.list("consumers/"):
        try:
            record = records.read(storage, entry.key, f"{storage.uri}/{entry.key}")
        except FileNotFoundError:
            continue  # signed off meanwhile
        place = f"{storage.uri}/{entry.key}"
        position = records.checked(ConsumerPosition, {k: v for k, v in record.items() if k != "digest"}, place)
        if position.saved > position.taken or _key(position.consumer) != entry.key:
            raise CorruptData(f"{place} makes no sense: {position}; delete it if no training reads this store")
        found.append(position)
    return found


class FlowControl(NamedTuple):
    """How many more units may be assigned to producers, given the consumers' positions. Pure.

    At most `ahead` units may be waiting for a reader (0: no bound). When so many are, no unit is assigned until half of
    them have been read.
    """

    ahead: int
    room: float = 0  # units; inf: as many as there are
    blocked_by: str = ""  # the slowest reader, while producers wait for it
    met: bool = False  # a reader has registered

    def look(self, readers: Sequence[ConsumerPosition], given_out: int) -> "FlowControl":
        """The state after reading the positions; `given_out`: units of the first pass that are leased or done.

        Before a reader has registered, nothing counts as read. When all have signed off, there is no bound.
        """
        met = self.met or bool(readers)
        if not self.ahead or (met and not readers):
            return FlowControl(self.ahead, math.inf, met=met)
        nobody = ConsumerPosition("a reader that is still to come", 0, 0)
        slowest = min(readers, key=lambda reader: reader.taken, default=nobody)
        waiting = given_out - slowest.taken
        limit = self.ahead // 2 + 1 if self.blocked_by else self.ahead
        if waiting >= limit:
            return FlowControl(self.ahead, 0, slowest.consumer, met)
        return FlowControl(self.ahead, self.ahead - waiting, met=met)


def starved_share(
    before: Sequence[ConsumerPosition], after: Sequence[ConsumerPosition], seconds: float
) -> float | None:
    """The share of `seconds` that the hungriest reader waited for rows; None if none has updated its position."""
    known = {reader.consumer: reader for reader in before}
    told = [
        reader.starved_s - known[reader.consumer].starved_s
        for reader in after
        if reader.consumer in known and reader != known[reader.consumer]
    ]
    return min(max(*told, 0.0) / seconds, 1.0) if told and seconds > 0 else None


def _key(consumer: str) -> str:
    return f"consumers/{format.checked_name(consumer, 'consumer')}.json"
