"""Several stores of the same tokens as one: what a crosscoder over several models reads.

A joined store has no rows of its own. Its store.json names the parts by their digests, parts.json says where they are;
a hook point `h` of part `p` is called `p.h`. Row for row, the parts are compared: their layout and the last slice of
every unit when they are joined, and every slice again whenever it is read.
"""

from collections.abc import Mapping
from typing import NamedTuple

from sae_dist import config
from sae_dist.config import UserError
from sae_dist.shards import records
from sae_dist.shards.commits import Commit
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.reader import Store
from sae_dist.shards.slices import Slice
from sae_dist.shards.statistics import Statistics
from sae_dist.storage import Storage

PARTS = "parts.json"
PREFIX = "part."  # of the keys of StoreMeta.extra that name a part


class PartsRecord(NamedTuple):
    """The record in parts.json."""

    uris: dict[str, str]
    digest: str


class JoinedStore(Store):
    """A store whose hook points lie in other stores."""

    def __init__(self, storage: Storage, meta: StoreMeta, parts: Mapping[str, Store]):
        """UserError where a part is not the store that was joined."""
        super().__init__(storage, meta)
        for name, digest in digests(meta).items():
            if (part := parts[name]).meta.digest != digest:
                raise UserError(
                    f"part {name} of store={storage.uri} was store {digest[:12]}, and {part.storage.uri} now is "
                    f"{part.meta.digest[:12]}; join again with the place of that store, or into another place"
                )
        self.parts = dict(parts)
        self._home = {f"{name}.{hook}": (part, hook) for name, part in parts.items() for hook in part.meta.hooks}

    def committed(self) -> dict[int, Commit]:
        there = set.intersection(*(set(part.committed()) for part in self.parts.values()))
        return {unit: commit for unit in sorted(there) if (commit := self.commit(unit)) is not None}

    def _read_commit(self, unit: int) -> Commit | None:
        """The commits of all parts as one; it keeps its digest where a unit is harvested again with the same rows."""
        found = {name: part.commit(unit) for name, part in self.parts.items()}
        commits = {name: commit for name, commit in found.items() if commit is not None}
        if len(commits) < len(found):
            return None
        (first, one), *others = commits.items()
        for name, other in others:
            if other.rows != one.rows:
                raise UserError(
                    f"unit {unit} has {one.rows} rows in {self.parts[first].storage.uri} and {other.rows} in "
                    f"{self.parts[name].storage.uri}, so that they do not correspond (`sae-dist store ls` says how "
                    "many were left out); harvest both with harvest.rows.max_norm_ratio=null, or import with "
                    "max_norm_ratio=null"
                )
        shards = {f"{name}.{hook}": shard for name, commit in commits.items() for hook, shard in commit.shards.items()}
        digest = config.digest({hook: shard.xxh3_128 for hook, shard in shards.items()})
        return Commit(unit, "joined", self.meta.digest, one.rows, one.dropped, shards, digest)

    def read_slice(self, hook: str, unit: int, index: int) -> Slice:
        if hook not in self._home:
            raise self._no_such(hook)
        part, own = self._home[hook]
        return part.read_slice(own, unit, index)

    def unit_statistics(self, unit: int, hook: str) -> Statistics | None:
        part, own = self._home[hook]
        return part.unit_statistics(unit, own)

    def _cure_of_other_rows(self, unit: int) -> str:
        return f"unit {unit} of the stores that are joined is not of the same text and settings: harvest them alike"


def digests(meta: StoreMeta) -> dict[str, str]:
    """The digests of the parts, by name; {} for a store with rows of its own."""
    return {key.removeprefix(PREFIX): value for key, value in meta.extra.items() if key.startswith(PREFIX)}


def addresses(storage: Storage, meta: StoreMeta) -> dict[str, str]:
    """Where the parts are, by name."""
    place = f"{storage.uri}/{PARTS}"
    try:
        record = records.checked(PartsRecord, records.read(storage, PARTS, place), place)
    except FileNotFoundError:
        raise UserError(f"{place} does not exist; join the parts again with `sae-dist store join`") from None
    if record.uris.keys() != digests(meta).keys():
        raise UserError(f"{place} names {', '.join(record.uris)}, not {', '.join(digests(meta))}; join them again")
    return record.uris
