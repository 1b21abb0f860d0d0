"""Which device a rank computes on: each a GPU of its own, or all of them on processors.

Who starts the ranks decides. Ray gives an actor its GPU and hides the others; ranks of torchrun take the GPU of their
number on the machine, and agree when they meet (train/parallel/mesh_session.py).
"""

import socket
from collections.abc import Sequence
from typing import Literal

import torch

from sae_dist.config import UserError
from sae_dist.service.placement import Bundle, Node, fits
from sae_dist.train.config import MeshConfig

DeviceChoice = Literal["auto", "cpu", "cuda"]  # train.device
CPU_BUNDLE = Bundle(1.0, 0.0)
GPU_BUNDLE = Bundle(1.0, 1.0)


def usable_gpus() -> int:
    """GPUs that this process sees and torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of_process(wanted: DeviceChoice, *, there: int) -> torch.device:
    """Where a training without a mesh computes, on a machine with `there` GPUs."""
    if wanted == "cuda" and there == 0:
        raise UserError("train.device=cuda, but this process sees no usable GPU; use train.device=auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and there else "cpu")


def device_of_local_rank(wanted: DeviceChoice, *, rank: int, ranks: int, there: int) -> torch.device:
    """The GPU of the `rank`-th of `ranks` on this machine, which has `there`; UserError where cuda has too few."""
    if wanted == "cuda" and there < ranks:
        raise UserError(
            f"train.device=cuda, but {ranks} ranks were started on {socket.gethostname()}, which has {there} usable "
            "GPUs; start as many ranks as there are GPUs, or use train.device=auto or cpu"
        )
    return torch.device("cuda", rank) if wanted != "cpu" and there >= ranks else torch.device("cpu")


def device_of_actor(wanted: DeviceChoice, mesh: MeshConfig, bundle: Bundle) -> torch.device:
    """What Ray has given a rank of `mesh`, which asked for `bundle`: of the GPUs it sees only that one.

    A single rank asks for none (bundle_of_rank): it takes one that it sees.
    """
    if mesh.data * mesh.feature == 1:
        return device_of_process(wanted, there=usable_gpus())
    if not bundle.gpus:
        return torch.device("cpu")
    if not usable_gpus():
        raise UserError(
            f"Ray gave a rank a GPU of {socket.gethostname()}, which torch {torch.__version__} there cannot use; "
            "install a torch with CUDA, or use train.device=cpu"
        )
    return torch.device("cuda", 0)


def bundle_of_rank(wanted: DeviceChoice, mesh: MeshConfig, nodes: Sequence[Node], *, taken: float = 0.0) -> Bundle:
    """What every rank's actor asks Ray for: a GPU, where these machines have one for each beside `taken` others.

    A single rank asks for none: it uses one that it sees. UserError where cuda was wanted and there are too few.
    """
    ranks = mesh.data * mesh.feature
    if wanted == "cpu" or ranks == 1:
        return CPU_BUNDLE
    there = sum(node.total.get("GPU", 0.0) for node in nodes)
    if sum(fits(GPU_BUNDLE, node.total) for node in nodes) >= ranks and there >= ranks + taken:
        return GPU_BUNDLE
    if wanted == "cuda":
        beside = f", beside {taken:g} of the harvest's" if taken else ""
        raise UserError(
            f"train.device=cuda needs {ranks} GPUs for mesh.data={mesh.data} x mesh.feature={mesh.feature}, one a "
            f"rank{beside}, but the cluster has {there:g}; lower mesh.data or mesh.feature, give cluster= a larger "
            "one, or use train.device=auto or cpu"
        )
    return CPU_BUNDLE
