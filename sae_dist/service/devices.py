"""Which device a rank computes on: one GPU each, or the CPU for all of them.

Who starts the ranks decides. Ray gives an actor the share of a GPU that it reserved (gpu_shares.py); ranks of torchrun
take the GPU of their number on the machine, and agree when they meet (train/parallel/mesh_session.py).
"""

import socket
from typing import Literal

import torch

from sae_dist.config import UserError
from sae_dist.service.placement import Bundle

DeviceChoice = Literal["auto", "cpu", "cuda"]  # train.device
CPU_BUNDLE = Bundle(1.0, 0.0)
GPU_BUNDLE = Bundle(1.0, 1.0)


def usable_gpus() -> int:
    """The number of GPUs that this process sees and torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of_process(wanted: DeviceChoice, *, there: int) -> torch.device:
    """The device of a training in one process, on a machine with `there` GPUs."""
    if wanted == "cuda" and there == 0:
        raise UserError("train.device=cuda, but this process sees no usable GPU; use train.device=auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and there else "cpu")


def device_of_local_rank(wanted: DeviceChoice, *, rank: int, ranks: int, there: int) -> torch.device:
    """The device of local rank `rank` of `ranks`, on a machine with `there` GPUs; UserError when cuda has too few."""
    if wanted == "cuda" and there < ranks:
        raise UserError(
            f"train.device=cuda, but {ranks} ranks were started on {socket.gethostname()}, which has {there} usable "
            "GPUs; start as many ranks as there are GPUs, or use train.device=auto or cpu"
        )
    return torch.device("cuda", rank) if wanted != "cpu" and there >= ranks else torch.device("cpu")


def device_of_actor(bundle: Bundle) -> torch.device:
    """What Ray has given a process that reserved `bundle`: of the GPUs it sees only that one, or none."""
    if not bundle.gpus:
        return torch.device("cpu")
    if not usable_gpus():
        raise UserError(
            f"Ray gave a rank a GPU of {socket.gethostname()}, which torch {torch.__version__} there cannot use; "
            "install a torch with CUDA, or use train.device=cpu"
        )
    return torch.device("cuda", 0)
