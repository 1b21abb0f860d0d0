"""What a training is asked to do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist import storage
from sae_dist.config import digest
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.reader import Store
from sae_dist.storage import Storage
from sae_dist.train.config import TrainConfig
from sae_dist.train.members import Member
from sae_dist.train.state import RowSource


class Task(NamedTuple):
    """Which dictionaries to train, on which rows, into which folder; the same on every rank."""

    store: Store
    hook: str
    members: Sequence[Member]  # one a dictionary, the main one first
    config: TrainConfig
    order: OrderConfig
    seed: int  # of the order of the rows
    out: Path
    live: bool = False  # the store may still be growing; otherwise its manifest is pinned
    provenance: Mapping[str, Any] = {}  # what the dictionaries say of where they come from
    checkpoint_timeout_s: float = 1800.0  # a rank waits so long for others to have written

    @property
    def d_model(self) -> int:
        return self.store.meta.hooks[self.hook]

    @property
    def checkpoints(self) -> Storage:
        return storage.open(self.config.checkpoints or self.out / "checkpoints")

    @property
    def run_id(self) -> str:
        """In the names of this training's checkpoints: equal for two that must end in the same dictionaries."""
        return digest([*self.source(None)])[:8]

    def source(self, manifest: int | None) -> RowSource:
        """What a checkpoint says of its rows, with the version of the store's manifest that they are pinned to."""
        return RowSource(self.store.meta.digest, self.hook, manifest, self.provenance.get("config_hash"))

    def named(self, member: Member) -> str:
        """What a message about a member begins with; nothing where there is one dictionary alone."""
        return f"{member.name}: " if len(self.members) > 1 else ""
