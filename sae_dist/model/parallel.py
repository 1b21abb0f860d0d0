"""Tensor-parallel models: how the processes of a replica meet, and what each of them loads.

They form a torch.distributed world of their own (NCCL between GPUs, gloo on CPUs). transformers shards the model over
it by its plan for the architecture: every matrix of attention and MLP is split, each process reads only its slices of
the safetensors files, and two all-reduces a layer restore the stream.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.distributed.configuration_utils import DistributedConfig

from sae_dist.config import UserError
from sae_dist.network import let_gloo_listen_towards
from sae_dist.parallel.key_value import StoreAddress, StoreClient, StoreServer


class ReplicaGroup(NamedTuple):
    """The processes of one replica, as one of them sees it; `ONE_PROCESS` where it has no others."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process writes the activations, which all of them have."""
        return self.rank == 0


ONE_PROCESS = ReplicaGroup(0, 1)
_STORES: list[Store] = []  # torch does not keep a store in Python alive


def join(
    rank: int,
    size: int,
    *,
    at: StoreAddress,
    device: torch.device,
    served: StoreServer | None = None,
    timeout_s: float = 600.0,
) -> ReplicaGroup:
    """Makes this process rank `rank` of a replica of `size`; returns when all of them have come.

    They meet in the store `at`, which the first of them has `served`.

    A peer that dies makes the next sum raise RuntimeError in the others; one that hangs, after `timeout_s`.
    """
    if dist.is_initialized():
        raise RuntimeError("this process belongs to a process group already; a replica's processes are its own")
    wait = timedelta(seconds=timeout_s)
    store = StoreClient(at, timeout_s) if served is None else served
    store.set_timeout(wait)
    _STORES.append(store)
    let_gloo_listen_towards(at.host)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=wait
    )
    return ReplicaGroup(rank, size)


def sharding(config: PreTrainedConfig, size: int) -> DistributedConfig:
    """The plan by which `size` processes hold a model of `config`; raises `UserError` for a family without one.

    Attention is split by heads. Where the heads do not divide (SmolLM2 has 9, and 3 of keys and values), every process
    has attention whole and only the MLP, which has most of the weights, is split.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    plan: Mapping[str, str] = skeleton.tp_plan
    if not plan:
        raise UserError(
            f"harvest.tensor_parallel={size}: transformers has no tensor-parallel plan for {type(skeleton).__name__}; "
            "use harvest.tensor_parallel=1, and model.device_map=auto where it does not fit one device"
        )
    if not undivided_heads(config, size):
        return DistributedConfig(tp_size=size, tp_plan="auto")
    whole = {name: "replicate" for name in plan if "attn" in name or "attention" in name}
    if whole.keys() >= plan.keys():
        raise UserError(
            f"harvest.tensor_parallel={size} does not divide the heads of {type(skeleton).__name__}; choose one of "
            f"{', '.join(str(n) for n in dividing(config))}"
        )
    return DistributedConfig(tp_size=size, tp_plan=whole)


def undivided_heads(config: PreTrainedConfig, size: int) -> bool:
    """Whether the heads, of queries or of keys and values, do not divide over `size` processes."""
    return any(heads % size for heads in _heads(config))


def dividing(config: PreTrainedConfig, most: int = 16) -> list[int]:
    """The sizes up to `most` that divide every kind of head."""
    return [size for size in range(1, most + 1) if not undivided_heads(config, size)]


def _heads(config: PreTrainedConfig) -> tuple[int, int]:
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    return heads, int(getattr(text, "num_key_value_heads", None) or heads)


def whole(weight: Tensor) -> Tensor:
    """The weight as one tensor in every process; a collective call: all must ask for the same weight."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def gather_last_dim(x: Tensor, width: int) -> Tensor:
    """Gathers every process's slice of the last dim into [..., width]; returns `x` itself if it is whole."""
    if x.shape[-1] == width:
        return x
    size = dist.get_world_size()
    slices = [torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device) for n in _slices(width, size)]
    dist.all_gather(slices, x.contiguous())
    return torch.cat(slices, dim=-1)


def _slices(width: int, size: int) -> list[int]:
    """The sizes of DTensor's slices: as large as the first, until nothing is left."""
    first = -(-width // size)
    return [max(0, min(first, width - rank * first)) for rank in range(size)]


def held_bytes(model: Any) -> int:
    """Bytes of parameters and buffers that this process holds."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)
