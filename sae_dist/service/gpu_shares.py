"""Which share of a GPU each process of a job reserves: a pure function of the cluster and of what was asked.

Ray hands a process the GPUs that it reserved and no others. Two ranks of one training, or two processes of one replica,
never share a GPU: nccl refuses that. A replica and a rank may share one; then they take turns on it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sae_dist.config import UserError
from sae_dist.harvest.config import HarvestConfig
from sae_dist.service.devices import CPU_BUNDLE, GPU_BUNDLE, DeviceChoice
from sae_dist.service.placement import Bundle, Node
from sae_dist.train.config import MeshConfig

RANK_SHARE = 0.6  # of a GPU that replicas use too: more than half, so that no GPU gets two ranks


class GpuShares(NamedTuple):
    """What each process reserves: of a replica of the language model, and of the training."""

    replica: Bundle
    rank: Bundle


def share_gpus(
    nodes: Sequence[Node],
    *,
    harvest: HarvestConfig | None = None,
    mesh: MeshConfig | None = None,
    device: DeviceChoice = "auto",
) -> GpuShares:
    """The shares of a job with these replicas and this training, either of which may be missing.

    `device` is train.device. A GPU each where there are enough. Otherwise ranks come first, one GPU each or none at
    all, and replicas share what is left, or the ranks' GPUs. UserError where cuda was asked for and there are too few.
    """
    gpus = sum(math.floor(node.total.get("GPU", 0.0)) for node in nodes)
    ranks = 0 if mesh is None or device == "cpu" else mesh.data * mesh.feature
    processes = 0 if harvest is None else harvest.least_processes
    given = None if harvest is None or harvest.gpus == "auto" else float(harvest.gpus)
    apart = harvest is not None and harvest.tensor_parallel > 1  # its processes want a GPU each
    taken = processes if given is None else math.ceil(processes * given)
    if ranks and gpus >= ranks + taken:
        return GpuShares(GPU_BUNDLE if given is None else Bundle(1.0, given), GPU_BUNDLE)
    if given is not None:
        room = ranks and gpus >= ranks and given <= 1 - RANK_SHARE and processes <= ranks
        if not room:
            _refuse_cuda(device, mesh, gpus, taken)
        return GpuShares(Bundle(1.0, given), Bundle(1.0, RANK_SHARE) if room else CPU_BUNDLE)
    if ranks and (gpus < ranks or apart):
        _refuse_cuda(device, mesh, gpus, taken if apart else 0)
        ranks = 0
    if gpus == 0 or (apart and gpus < processes):
        return GpuShares(CPU_BUNDLE, CPU_BUNDLE)
    if ranks == gpus:
        return GpuShares(Bundle(1.0, _part(1 - RANK_SHARE, processes, gpus)), Bundle(1.0, RANK_SHARE))
    return GpuShares(Bundle(1.0, _part(1.0, processes, gpus - ranks)), GPU_BUNDLE if ranks else CPU_BUNDLE)


def _part(share: float, processes: int, gpus: int) -> float:
    """What each of `processes` gets of `share` of so many GPUs; rounded down as Ray counts, in ten-thousandths."""
    return math.floor(share / max(math.ceil(processes / gpus), 1) * 10_000) / 10_000


def _refuse_cuda(device: DeviceChoice, mesh: MeshConfig | None, gpus: int, taken: int) -> None:
    if device != "cuda" or mesh is None:
        return
    beside = f", beside {taken} of the harvest's" if taken else ""
    raise UserError(
        f"train.device=cuda needs {mesh.data * mesh.feature} GPUs for mesh.data={mesh.data} x mesh.feature="
        f"{mesh.feature}, one a rank{beside}, but the cluster has {gpus}; lower mesh.data or mesh.feature, give "
        "cluster= a larger one, or use train.device=auto or cpu"
    )


def describe_shares(shares: GpuShares, *, replicas: int, ranks: int) -> str:
    """Who got what, as a line: `2 replica processes: 0.4 of a GPU each; 1 rank: 0.6 of a GPU`."""
    parts = (("replica process", replicas, shares.replica.gpus), ("rank", ranks, shares.rank.gpus))
    return "; ".join(
        f"{n} {name}{'es' if name[-1] == 's' and n > 1 else 's' * (n > 1)}: {_said(gpus, n)}"
        for name, n, gpus in parts
        if n
    )


def _said(gpus: float, n: int) -> str:
    each = " each" if n > 1 else ""
    if not gpus:
        return "on processors"
    return f"a GPU{each}" if gpus == 1 else f"{gpus:g} GPUs{each}" if gpus > 1 else f"{gpus:g} of a GPU{each}"
