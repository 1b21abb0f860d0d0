"""How a sweep goes about its points."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen, local_folder
from sae_dist.sweep.halving import HalvingConfig
from sae_dist.sweep.search import SearchConfig


@frozen
class SweepConfig:
    """What its passes may take together, and how they are made up."""

    # passes at a time; null: as many as cpus and gpus allow, one where neither is given and there is no GPU
    jobs: Annotated[int, Field(ge=1)] | None = None
    cpus: Annotated[int, Field(ge=1)] | None = None  # cores for all passes together; null: those of this machine
    gpus: Annotated[int, Field(ge=0)] | None = None  # GPUs for all passes together; null: those of this machine
    # for all passes together, on this machine or on each GPU; null: nine tenths of what is free when the sweep starts
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    points_per_pass: Annotated[int, Field(ge=1)] | None = None  # at most; null: as many as memory holds
    tries: Annotated[int, Field(ge=1)] = 2  # of a pass whose process died, before it is split or its point failed
    halving: HalvingConfig = HalvingConfig()
    search: SearchConfig = SearchConfig()
    target_fvu: Annotated[float, Field(gt=0)] | None = None  # no pass is begun any more once a point has come so low
    # latents that the report continues the scaling laws to; null: four times the largest size of the sweep
    extrapolate_to: Annotated[int, Field(ge=1)] | None = None
    price_hour: Annotated[float, Field(ge=0)] | None = None  # of an hour of a pass, for what a point costs


@frozen
class SweepJob:
    """A sweep: what `sae-dist sweep` takes besides the keys of the command that is swept."""

    out: str | None = None  # the sweep's folder; null: sweeps/<command>
    retry: Literal["failed"] | None = None  # failed: points that failed are tried again
    # points to work on, by the beginning of their id or by a value: only=3f2a only=sae.k=16; null: all of them
    only: tuple[str, ...] | None = None
    search: Literal["optuna"] | None = None  # optuna: chooses points by what came of others; null: all combinations
    sweep: SweepConfig = SweepConfig()

    def __post_init__(self) -> None:
        if self.out is not None:
            local_folder("out", self.out)
