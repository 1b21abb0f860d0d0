"""The mesh: ranks on a data axis and a feature axis; a rank is data.rank * feature.size + feature.rank.

The feature axis splits the latents: a rank has its rows of W_enc, W_dec and b_enc, and their moments. The data axis
splits the rows that are encoded; data ranks hold equal copies of their latents, bit for bit. Every rank has b_dec.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from sae_dist.config import UserError
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.watchdog import MARGIN_S


@dataclass(frozen=True)
class Axis:
    """This rank's place on an axis; `group` is None where the axis has one rank."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None


@dataclass
class Traffic:
    """Totals of one kind of exchange on this rank."""

    calls: int = 0
    bytes: int = 0  # received from other ranks
    seconds: float = 0.0  # including waits for other ranks


class GpuTiming(NamedTuple):
    """Start and end of an exchange in a GPU's queue; its time is known once the GPU has reached the end."""

    traffic: Traffic
    begun: torch.cuda.Event
    ended: torch.cuda.Event


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The two axes, and `world`: all ranks as one axis. `control` exchanges small CPU tensors on any device."""

    data: Axis
    feature: Axis
    world: Axis
    control: Axis
    device: torch.device
    timeout_s: float  # no collective lasts longer
    traffic: dict[str, Traffic] = field(default_factory=dict, compare=False)  # by name of the exchange
    gpu_timings: list[GpuTiming] = field(default_factory=list, compare=False)  # whose seconds are not in `traffic` yet

    @staticmethod
    def single(device: str | torch.device = "cpu") -> "Mesh":
        """One process, no process group."""
        alone = Axis(0, 1)
        return Mesh(
            data=alone, feature=alone, world=alone, control=alone, device=torch.device(device), timeout_s=float("inf"),
        )  # fmt: skip

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank does what must happen once: logs, manifests, dictionaries."""
        return self.world.rank == 0

    def latents(self, n_latents: int) -> range:
        """The latents that this rank owns; UserError where some rank would have none."""
        if len(owned_range(n_latents, Axis(self.feature.size - 1, self.feature.size))) == 0:
            raise UserError(
                f"mesh.feature={self.feature.size} ranks for sae.n_latents={n_latents}: parts of "
                f"{-(-n_latents // self.feature.size)} leave the last rank without a latent; use fewer ranks"
            )
        return owned_range(n_latents, self.feature)

    def close(self) -> None:
        """Leave the process group."""
        if self.world.group is not None:
            dist.destroy_process_group()


def owned_range(n: int, axis: Axis) -> range:
    """This rank's part of range(n): chunks of ceil(n / size), as torch's Shard splits; the last may be shorter."""
    size = -(-n // axis.size)
    return range(min(axis.rank * size, n), min((axis.rank + 1) * size, n))


def owned_ranges(n: int, size: int) -> list[range]:
    """`owned_range` of every rank."""
    return [owned_range(n, Axis(rank, size)) for rank in range(size)]


def connect(
    config: MeshConfig, *, rank: int, world: int, device: str | torch.device, store: Store | None = None
) -> Mesh:
    """The mesh of `world` processes that all call this, connected by `store` (not needed for one process).

    Uses gloo on CPUs, and nccl on GPUs with gloo for CPU tensors. A gloo exchange that times out raises; one of nccl
    ends the process (watchdog.py). UserError where the axes do not fit the world.
    """
    device = torch.device(device)
    if world != config.data * config.feature:
        raise UserError(
            f"mesh.data={config.data} x mesh.feature={config.feature} = {config.data * config.feature} ranks, but "
            f"{world} processes were started; make them equal"
        )
    if world == 1:
        return Mesh.single(device)
    assert store is not None, "ranks need a store to meet at"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"  # torch's watchdog ends the process
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")  # at once, without minutes of traces
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=_timeout(config, device),
    )  # fmt: skip
    return from_process_group(config, device)


def from_process_group(config: MeshConfig, device: str | torch.device) -> Mesh:
    """The mesh over the default process group, which must exist."""
    timeout = _timeout(config, torch.device(device))
    rank, ranks = dist.get_rank(), torch.arange(config.data * config.feature).view(config.data, config.feature)

    def axis(groups: list[list[int]]) -> Axis:
        own = Axis(0, 1)
        for members in groups:  # all ranks must create all groups in one order
            group = dist.new_group(members, timeout=timeout)
            if rank in members:
                own = Axis(members.index(rank), len(members), group)  # type: ignore[arg-type]
        return own

    data, feature = axis(ranks.T.tolist()), axis(ranks.tolist())
    world = Axis(rank, config.data * config.feature, dist.group.WORLD)
    return Mesh(
        data=data if data.size > 1 else Axis(0, 1),
        feature=feature if feature.size > 1 else Axis(0, 1),
        world=world,
        control=world,
        device=torch.device(device),
        timeout_s=config.collective_timeout_s,
    )


def _timeout(config: MeshConfig, device: torch.device) -> timedelta:
    return timedelta(seconds=config.collective_timeout_s + (MARGIN_S if device.type == "cuda" else 0.0))
