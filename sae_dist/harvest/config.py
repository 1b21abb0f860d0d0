"""How much to harvest and how."""

import re
from typing import Annotated, Literal, NamedTuple, assert_never

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.shards.format import DType
from sae_dist.shards.retention import Keep, Ring, UntilConsumed


class ReplicaRange(NamedTuple):
    """Between how many replicas a harvest may have; equal where the number is fixed."""

    least: int
    most: int


@frozen
class RowPolicy:
    """Which positions of a sequence become rows; recorded in the store, since a dictionary is only as good as its rows.

    The first position of a sequence carries a massive activation (SmolLM2-135M: norm 24,000 where others have 200),
    which would rule every mean and every squared error.
    """

    drop_first: Annotated[int, Field(ge=0)] = 1  # positions at the start of every sequence
    # positions that hold the tokenizer's separator (BOS / EOS); of a conversation, the one that opens it is never a row
    drop_special: bool = True
    # rows longer than this times their unit's median are outliers; null keeps all
    max_norm_ratio: Annotated[float, Field(gt=1)] | None = 10.0


@frozen
class HarvestConfig:
    """Text and model -> activation store."""

    tokens: Annotated[int, Field(ge=1)] = 10_000_000  # training positions run through the model
    heldout_tokens: Annotated[int, Field(ge=1)] = 65_536  # more, of documents that training never sees
    seed: int = 0  # which sequences make which unit; a sweep over the run's seed shares one store
    context: Annotated[int, Field(ge=2)] = 128  # positions a sequence
    unit_sequences: Annotated[int, Field(ge=1)] = 64  # sequences a unit: what is leased, committed and lost at once
    batch_sequences: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"  # sequences a forward pass; auto: by memory
    batch_memory_gb: Annotated[float, Field(gt=0)] = 2.0  # auto: what a batch may take in the model
    dtype: DType = "bfloat16"  # of the stored rows
    slice_rows: Annotated[int, Field(ge=1)] = 8_192  # rows a slice: the atom of order, range reads and checksums
    tensor_parallel: Annotated[int, Field(ge=1)] = 1  # processes that hold a replica's model together
    replicas: int | str = 1  # of the model; `1..4`: from 1 to 4, by who waits for whom
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads a process; 0: the cores divided by the processes
    # GPUs a process, 0 for none; auto: one each, or a share where replicas and ranks are more than the GPUs
    gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    lease_s: Annotated[float, Field(gt=0)] = 120.0  # a replica without a sign of life for so long is replaced
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0  # or one that has not loaded its model by then
    ahead_units: Annotated[int, Field(ge=0)] = 0  # units that harvesting runs ahead of the slowest reader; 0: no bound
    # of units that every reader is through with: keep, until_consumed, or ring
    retention: Literal["keep", "until_consumed", "ring"] = "keep"
    ring_gb: Annotated[float, Field(ge=0)] = 1000.0  # ring: what stays on disk, as far as readers allow
    # a unit with more NaN or Inf rows stops the harvest
    max_nonfinite_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_outlier_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # or with more rows that max_norm_ratio drops
    rows: RowPolicy = RowPolicy()

    @property
    def replica_range(self) -> ReplicaRange:
        """`replicas` as numbers; ValueError for anything but a number or two of them in order."""
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(self.replicas))
        if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
            raise ValueError(f"harvest.replicas={self.replicas}; give a number from 1 on, or two: 1..4")
        return ReplicaRange(int(found[1]), int(found[2] or found[1]))

    @property
    def retention_policy(self) -> Keep | UntilConsumed | Ring:
        """`retention` as shards/retention.py wants it."""
        match self.retention:
            case "keep":
                return Keep()
            case "until_consumed":
                return UntilConsumed()
            case "ring":
                return Ring(bytes=round(self.ring_gb * 1e9))
        assert_never(self.retention)

    @property
    def least_processes(self) -> int:
        """Processes of all replicas, when there are as few as there may be."""
        return self.replica_range.least * self.tensor_parallel

    @property
    def most_processes(self) -> int:
        """Processes of all replicas, when there are as many as there may be."""
        return self.replica_range.most * self.tensor_parallel

    def __post_init__(self) -> None:
        _ = self.replica_range  # refuses what is none
        if self.rows.drop_first >= self.context:
            raise ValueError(
                f"harvest.rows.drop_first={self.rows.drop_first} drops all of harvest.context={self.context}; lower it"
            )
