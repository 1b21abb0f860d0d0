"""How much to harvest and how."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.shards.format import DType


@frozen
class RowPolicy:
    """Which positions of a sequence become rows; recorded in the store, since a dictionary is only as good as its rows.

    The first position of a sequence carries a massive activation (SmolLM2-135M: norm 24,000 where others have 200),
    which would rule every mean and every squared error.
    """

    drop_first: Annotated[int, Field(ge=0)] = 1  # positions at the start of every sequence
    drop_special: bool = True  # positions that hold the tokenizer's separator (BOS / EOS)
    max_norm_ratio: Annotated[float, Field(gt=1)] | None = (
        10.0  # rows longer than this times their unit's median; None keeps all
    )


@frozen
class HarvestConfig:
    """Text and model -> activation store."""

    tokens: Annotated[int, Field(ge=1)] = 10_000_000  # training positions run through the model
    heldout_tokens: Annotated[int, Field(ge=1)] = 65_536  # more, of documents that training never sees
    seed: int = (
        0  # which sequences make which unit; apart from the run's seed, so that a sweep over seeds shares one store
    )
    context: Annotated[int, Field(ge=2)] = 128
    unit_sequences: Annotated[int, Field(ge=1)] = 64  # sequences a unit: what is leased, committed and lost at once
    batch_sequences: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"  # sequences a forward pass
    batch_memory_gb: Annotated[float, Field(gt=0)] = 2.0  # auto: what a batch may take in the model
    dtype: DType = "bfloat16"  # of the stored rows
    slice_rows: Annotated[int, Field(ge=1)] = 8_192  # rows a slice: the atom of order, range reads and checksums
    tensor_parallel: Annotated[int, Field(ge=1)] = 1  # processes that hold a replica's model together
    replicas: Annotated[int, Field(ge=1)] = 1  # model replicas, each a Ray actor
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads a replica; 0: the cores divided by the replicas
    gpus: Annotated[float, Field(ge=0)] = 0.0  # GPUs a replica
    max_nonfinite_fraction: Annotated[float, Field(ge=0, le=1)] = (
        0.01  # a unit with more NaN or Inf rows stops the harvest
    )
    max_outlier_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # or with more norm outliers
    rows: RowPolicy = RowPolicy()

    def __post_init__(self) -> None:
        if self.rows.drop_first >= self.context:
            raise ValueError(
                f"harvest.rows.drop_first={self.rows.drop_first} drops all of harvest.context={self.context}; lower it"
            )
