"""What a training is asked to do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist import storage
from sae_dist.config import digest
from sae_dist.shards.hooks import Hooks, widths
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.reader import Store
from sae_dist.storage import Storage
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import Member
from sae_dist.train.state import RowSource


class Task(NamedTuple):
    """Which dictionaries to train, on which rows, into which folder; the same on every rank."""

    store: Store
    hooks: Hooks
    members: Sequence[Member]  # the main one first
    config: TrainConfig
    order: OrderConfig
    seed: int  # of the order of the rows
    out: Path
    live: bool = False  # the store may still be growing; otherwise its manifest is pinned
    provenance: Mapping[str, Any] = {}  # for the dictionaries' config.json
    checkpoint_timeout_s: float = 1800.0  # a rank waits so long for the others to write

    @property
    def sides(self) -> list[dict[str, int]]:
        """The width of every hook point of x, and of those of the target where that is something else."""
        return [widths(self.store.meta, names) for names in self.hooks.sides]

    @property
    def init_rows(self) -> int:
        """Rows that the dictionaries begin from: as many as the one that wants most."""
        meta = self.store.meta
        stored = meta.train_units * meta.unit_rows
        return max(self.config.rows_to_begin(member.sae.n_latents, stored=stored) for member in self.members)

    @property
    def checkpoints(self) -> Storage:
        return storage.open(self.config.checkpoints or self.out / "checkpoints")

    @property
    def run_id(self) -> str:
        """Part of the names of this training's checkpoints; equal for runs of one configuration and store."""
        return digest([*self.source(None)])[:8]

    def source(self, manifest: int | None) -> RowSource:
        """The row source of a checkpoint; `manifest` is the store's version that the order is pinned to."""
        return RowSource(self.store.meta.digest, str(self.hooks), manifest, self.provenance.get("config_hash"))

    def named(self, member: Member) -> str:
        """Prefix of messages about a member; empty where there is only one."""
        return f"{member.name}: " if len(self.members) > 1 else ""
