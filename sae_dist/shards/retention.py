"""How long a store keeps the data of units that every consumer has consumed: keep | ring | until_consumed."""

import re
from typing import Literal

from pydantic import Field

from sae_dist import faults
from sae_dist.config import frozen
from sae_dist.shards import format, records
from sae_dist.shards.consumers import positions
from sae_dist.shards.reader import Store


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


def retire(store: Store, policy: Keep | Ring | UntilConsumed) -> list[int]:
    """Deletes the data of units as the policy says, oldest first, and returns them; commits and statistics stay.

    Never deleted: held-out units, anything before a consumer is registered, and units that a consumer would need to
    resume from its checkpoint.
    """
    consumers = positions(store.storage)
    saved = min((p.saved for p in consumers), default=0)
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
