"""What a store holds, for people: one line a store, one line a unit, the statistics of every hook."""

from typing import NamedTuple

from sae_dist.shards.consumers import ConsumerPosition, positions
from sae_dist.shards.reader import Store
from sae_dist.shards.statistics import Statistics


class UnitSummary(NamedTuple):
    """One committed unit."""

    unit: int
    rows: int
    dropped: int
    bytes: int
    slices: int
    attempt: str
    heldout: bool


class StoreSummary(NamedTuple):
    """A store as a whole; `relative_error` is what storing cost: sum ||x - stored||^2 / sum ||x||^2, worst unit."""

    uri: str
    digest: str
    model: str
    hooks: dict[str, int]
    dtype: str
    units: list[UnitSummary]
    n_units: int
    heldout_units: int
    relative_error: dict[str, float]
    consumers: list[ConsumerPosition]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)


def summarize(store: Store) -> StoreSummary:
    """Everything but the statistics, from the commits alone."""
    meta, commits = store.meta, store.committed()
    units = [
        UnitSummary(
            unit,
            commit.rows,
            commit.dropped,
            sum(shard.bytes for shard in commit.shards.values()),
            len(next(iter(commit.shards.values())).slices),
            commit.attempt,
            unit >= meta.train_units,
        )
        for unit, commit in sorted(commits.items())
    ]
    errors = {hook: max((c.shards[hook].relative_error for c in commits.values()), default=0.0) for hook in meta.hooks}
    return StoreSummary(
        store.storage.uri,
        meta.digest,
        meta.model,
        dict(meta.hooks),
        meta.dtype,
        units,
        meta.n_units,
        meta.heldout_units,
        errors,
        positions(store.storage),
    )


def statistics(store: Store) -> dict[str, Statistics]:
    """Merged statistics of the training units that are there, by hook."""
    return {hook: store.statistics(hook) for hook in store.meta.hooks}
