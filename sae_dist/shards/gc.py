"""Garbage collection: deletes data without a commit, and uploads and files that killed writers left.

Nothing else is deleted, and nothing younger than `age_s`, which a producer may be about to commit.
"""

import re
from typing import NamedTuple

from sae_dist import faults
from sae_dist import storage as objects
from sae_dist.config import UserError
from sae_dist.shards import format
from sae_dist.shards.commits import Commit
from sae_dist.shards.reader import Store
from sae_dist.storage import Entry

DAY_S = 86_400.0
OWN_KEYS = re.compile(r"data/[A-Za-z0-9._-]+/\d{8,}/[A-Za-z0-9_-]+\.arrow|probe/[0-9a-f]{32}")


class Garbage(NamedTuple):
    """Objects without a commit, the number of such that are too young to delete, and whether they were deleted."""

    orphans: list[Entry]
    young: int
    deleted: bool

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.orphans)


def collect(store: Store, *, age_s: float = 2 * DAY_S, delete: bool = False, now: float | None = None) -> Garbage:
    """The orphans of a store; deletes them only if told to. `now` (s) is by the clock of the storage: None asks it."""
    if age_s < 0:
        raise UserError(f"age_s={age_s}; give the age in seconds beyond which no producer is still at work")
    storage = store.storage
    now = objects.clock(storage) if now is None else now
    # Data is listed before commits, so that data committed in between is not taken for an orphan.
    candidates = [
        entry for prefix in ("data/", "probe/") for entry in storage.list(prefix) if OWN_KEYS.fullmatch(entry.key)
    ]
    left = list(storage.leftovers())
    commits = store.committed()
    gone = {entry.key for entry in storage.list("retired/")}
    live = {
        shard.key
        for unit, commit in commits.items()
        if format.retired_key(unit) not in gone
        for shard in commit.shards.values()
    }
    orphans = [entry for entry in candidates if entry.key not in live]
    old = [entry for entry in orphans if now - entry.mtime >= age_s]
    old_left = [entry for entry in left if now - entry.mtime >= age_s]
    if delete:
        for entry in old:
            faults.point("gc.before_delete", key=entry.key)
            if not _committed_since(store, entry.key, commits):
                storage.delete(entry.key)
        for entry in old_left:
            storage.discard(entry)
    return Garbage(old + old_left, len(orphans) + len(left) - len(old) - len(old_left), delete)


def _committed_since(store: Store, key: str, before: dict[int, Commit]) -> bool:
    """Whether a producer slower than `age_s` has committed this data since `before` was read."""
    found = re.match(r"data/[^/]+/(\d+)/", key)
    commit = store.commit(int(found[1])) if found and int(found[1]) not in before else None
    return commit is not None and any(shard.key == key for shard in commit.shards.values())
