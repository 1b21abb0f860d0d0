"""How long and how fast to train, and by how many processes."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from sae_kernels.row_state import MomentFormat, ParameterFormat

from sae_dist.config import frozen, local_folder
from sae_dist.sae.initialize import CANDIDATES
from sae_dist.sae.variants.interface import Variant
from sae_dist.train.guard import GuardConfig

# Who starts the processes of a mesh. auto: this one for a mesh of 1, torchrun's where torchrun started it, else actors.
Launcher = Literal["auto", "process", "actors", "torchrun", "ray_train"]
DATA_WEIGHT = 0.8  # of `init_data_weight`, where there is a row for every latent
MOST_SILENT = 10_000_000  # tokens, of a latent that is not dead by default (Gao et al. 2024, App. A.2)
INIT_ROWS, MOST_INIT_ROWS = 16_384, 65_536  # of `init_rows`: comparing more with each other takes minutes on a laptop


@frozen
class TrainConfig:
    """Activation store -> dictionary."""

    # rows to train on; more than the store has means several epochs
    tokens: Annotated[int, Field(ge=1)] | None = 10_000_000
    steps: Annotated[int, Field(ge=1)] | None = None  # instead of tokens
    batch: Annotated[int, Field(ge=1)] = 4_096  # rows a step
    lr: Annotated[float, Field(gt=0)] | None = None  # null: 2e-4 / sqrt(n_latents / 2^14), more in short runs
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02  # of the steps; the learning rate rises from 0
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2  # of the steps, at the end; it falls to 0
    # rows that b_dec, W_enc and the input scale are estimated from; null: 16,384, and for W_enc and b_dec two for each
    # latent, up to 65,536 and to what the store holds
    init_rows: Annotated[int, Field(ge=2)] | None = None
    # where a dictionary lies that the training begins from: the folder of a run, or of a dictionary (an imported one
    # too), either at s3://, or hf://; null: it begins at random
    start_from: str | None = None
    # of the direction of a row of data in each initial decoder row, the rest is random; null: 0.8 (Circuits Update,
    # October 2025), but 0 for a dictionary with more latents than rows to begin from, many of which would begin alike
    init_data_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    # with target_hook: a linear map from what is read to what is rebuilt, beside the latents (a skip-transcoder)
    skip: bool = False
    # with as many hook points in hook as in target_hook: latents of layer l read the l-th alone, and write the l-th and
    # all after it (a cross-layer transcoder); matrices are stored whole
    cross_layer: bool = False
    # after these steps, dead latents begin anew at rows that are badly rebuilt (Bricken et al. 2023)
    resample_after: tuple[Annotated[int, Field(ge=1)], ...] = ()
    checkpoint_every: Annotated[int, Field(ge=1)] = 500  # steps
    checkpoints: str | None = None  # folder or URI (s3://bucket/prefix); null: <out>/checkpoints
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2  # the last so many
    keep_every: Annotated[int, Field(ge=0)] = 0  # keep those of every so many steps for good; 0: none
    log_every: Annotated[int, Field(ge=1)] = 20  # steps
    # folder on a local disk for what is read of a store on object storage, so that later epochs do not read it again;
    # shared by all ranks and runs of a machine; null: none
    cache: str | None = None
    cache_gb: Annotated[float, Field(gt=0)] | None = None  # what it may take, the least recently used goes; null: 64
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU a rank, if there are so many
    threads: Annotated[int, Field(ge=0)] = 0  # a rank; 0: the machine's cores, divided among its ranks
    micro_batch: Annotated[int, Field(ge=1)] | None = None  # rows that a rank encodes at once; null: all of its rows
    product: Literal["bfloat16", "float32"] = "bfloat16"  # the encoder's operands are rounded to it; float32 is slower
    # 4 bytes each; bfloat16_stochastic: 2, rounded at random without bias, no masters
    parameters: ParameterFormat = "float32"
    # Adam's, 8 bytes a parameter; int8: 2, both coded; factored: 1, the second a product of two vectors. On a GPU plain
    # torch computes what is not float32, there or in parameters: slower than the kernels
    moments: MomentFormat = "float32"
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # the most that the whole gradient may measure; null: any
    guard: GuardConfig = GuardConfig()
    # auto: this process for a mesh of 1 (of `run`: an actor), else actors; or process, actors, torchrun, ray_train
    launcher: Launcher = "auto"
    # of a mesh some rank of which died, without a checkpoint in between (ray_train: in all)
    max_restarts: Annotated[int, Field(ge=0)] = 5

    def __post_init__(self) -> None:
        if self.cache is not None:
            local_folder("train.cache", self.cache)
        elif self.cache_gb is not None:
            raise ValueError(f"train.cache_gb={self.cache_gb} without train.cache; give train.cache a local folder")
        if self.start_from is not None and self.init_data_weight:
            raise ValueError(
                f"train.init_data_weight={self.init_data_weight} is for latents that begin at random, and "
                f"train.start_from={self.start_from} is set; leave one of them out"
            )
        if self.tokens is None and self.steps is None:
            raise ValueError("train.tokens and train.steps are both null; set one of them")
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"train.warmup_fraction={self.warmup_fraction} + train.decay_fraction={self.decay_fraction} exceed 1"
            )

    @property
    def cache_bytes(self) -> int:
        return round((64.0 if self.cache_gb is None else self.cache_gb) * 1e9)

    @property
    def scale_rows(self) -> int:
        """Rows that the input scale is estimated from: the same for all dictionaries of a pass."""
        return INIT_ROWS if self.init_rows is None else self.init_rows

    def rows_to_begin(self, n_latents: int, *, stored: int) -> int:
        """Rows from which a dictionary begins, of a store of so many."""
        if self.init_rows is not None:
            return self.init_rows
        return max(INIT_ROWS, min(CANDIDATES * n_latents, MOST_INIT_ROWS, stored))

    def data_weight(self, *, n_latents: int, rows: int) -> float:
        """`init_data_weight`, of a dictionary that begins from so many rows."""
        if self.init_data_weight is not None:
            return self.init_data_weight
        return DATA_WEIGHT if n_latents <= rows else 0.0

    def dead_after(self, sae: Variant) -> int:
        """For how many tokens a dead latent has been silent."""
        if sae.dead_after_tokens is not None:
            return sae.dead_after_tokens
        return max(1, min(MOST_SILENT, self.n_steps * self.batch // 10))

    @property
    def n_steps(self) -> int:
        """`steps`, else the whole batches in `tokens` (one at least)."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return max(self.tokens // self.batch, 1)


@frozen
class MeshConfig:
    """The processes that train one dictionary: data x feature ranks."""

    data: Annotated[int, Field(ge=1)] = 1  # ranks that share a batch's rows
    feature: Annotated[int, Field(ge=1)] = 1  # ranks that share the latents
    # launcher=ray_train: goes on with so few data ranks while workers are missing; null: waits
    least_data: Annotated[int, Field(ge=1)] | None = None
    collective_timeout_s: Annotated[float, Field(gt=0)] = 300.0  # a rank silent for longer is given up
    checkpoint_timeout_s: Annotated[float, Field(gt=0)] = 1800.0  # a rank waits so long for others to have saved

    def __post_init__(self) -> None:
        if self.least_data is not None and self.least_data > self.data:
            raise ValueError(f"mesh.least_data={self.least_data} exceeds mesh.data={self.data}; lower it")

    def of_workers(self, workers: int) -> "MeshConfig":
        """What so many workers make: all feature ranks, which memory needs, and as many data ranks as that leaves."""
        return dataclasses.replace(self, data=min(workers // self.feature, self.data), least_data=None)
