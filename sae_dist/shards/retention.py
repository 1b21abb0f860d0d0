"""How long a store keeps the data of units that every consumer has consumed: keep | ring | until_consumed."""

import math
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from sae_dist import faults
from sae_dist.config import frozen
from sae_dist.shards import format, records
from sae_dist.shards.consumers import ConsumerPosition, positions
from sae_dist.shards.reader import Store

RING_EVERY_S = 60.0  # between two looks at a ring that grows while no consumer saves


@frozen
class Keep:
    """Deletes nothing."""

    kind: Literal["keep"] = "keep"


@frozen
class Ring:
    """Deletes consumed units while the store has more than `bytes`."""

    kind: Literal["ring"] = "ring"
    bytes: int = Field(default=1 << 40, ge=0)


@frozen
class UntilConsumed:
    """Deletes what every consumer had consumed at its last checkpoint, except the last `margin_units`."""

    kind: Literal["until_consumed"] = "until_consumed"
    margin_units: int = Field(default=0, ge=0)


def retired(store: Store) -> set[int]:
    """Units whose data was deleted or is being deleted."""
    found = (re.fullmatch(r"retired/(\d+)\.json", entry.key) for entry in store.storage.list("retired/"))
    return {int(match[1]) for match in found if match}


def present_units(store: Store) -> list[int]:
    """The training units whose data is there, in order."""
    return sorted(set(range(store.meta.train_units)) - retired(store))


class Retirement:
    """Retires units while a store is filled and read; `look` may be called as often as positions are read.

    Deciding lists the whole store. What may go changes only when the slowest consumer has saved, and in a ring as the
    store grows.
    """

    def __init__(self, store: Store, policy: Keep | Ring | UntilConsumed) -> None:
        self._store, self._policy = store, policy
        self._saved, self._looked = 0, -math.inf

    def look(self, consumers: Sequence[ConsumerPosition], now: float) -> list[int]:
        """The units that were retired now. `consumers`: their positions of now; `now`: s, of a monotonic clock."""
        saved = _saved_by_all(consumers)
        grown = isinstance(self._policy, Ring) and now - self._looked >= RING_EVERY_S
        if saved == 0 or (saved == self._saved and not grown):
            return []
        found = retire(self._store, self._policy)
        self._saved, self._looked = saved, now  # only now: what has failed is tried again at the next look
        return found


def _saved_by_all(consumers: Sequence[ConsumerPosition]) -> int:
    """Units that every consumer had consumed at its last checkpoint; 0 without a consumer."""
    return min((consumer.saved for consumer in consumers), default=0)


def retire(store: Store, policy: Keep | Ring | UntilConsumed) -> list[int]:
    """Deletes the data of units as the policy says, oldest first, and returns them; commits and statistics stay.

    Never deleted: held-out units, anything before a consumer is registered, and units that a consumer would need to
    resume from its checkpoint.
    """
    saved = _saved_by_all(positions(store.storage))
    if isinstance(policy, Keep) or saved == 0:
        return []
    commits = store.committed()
    gone = {entry.key for entry in store.storage.list("retired/")}
    present = [unit for unit in sorted(commits) if format.retired_key(unit) not in gone]
    sizes = {unit: sum(shard.bytes for shard in commits[unit].shards.values()) for unit in present}
    if isinstance(policy, UntilConsumed):
        free = [unit for unit in present if unit < min(saved - policy.margin_units, store.meta.train_units)]
    else:
        excess, free = sum(sizes.values()) - policy.bytes, []
        for unit in (u for u in present if u < min(saved, store.meta.train_units)):
            if excess <= 0:
                break
            free.append(unit)
            excess -= sizes[unit]
    for unit in free:
        store.storage.create(format.retired_key(unit), records.seal({"unit": unit, "saved": saved}))
        faults.point("retention.after_mark", unit=unit)
        for shard in commits[unit].shards.values():
            store.storage.delete(shard.key)
    return free
