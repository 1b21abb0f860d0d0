"""One step of the real program on a rank of a mesh of any size, with tensors that have shapes but no numbers.

torch's fake process group returns from every collective at once, and tensors on the device `meta` take no memory: the
code of `train.parallel` runs unchanged while its memory and exchanges are counted. Where it reads a value, it gets
the plan's assumption: every chosen latent is active, spread evenly over the parts.
"""

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sae_kernels.shard import Shard
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from sae_dist.plan.traffic import reaching
from sae_dist.plan.workload import Workload
from sae_dist.sae.variants.interface import own_vectors
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.batch_select import DIGIT
from sae_dist.train.parallel.mesh import from_process_group
from sae_dist.train.parallel.step import MeshStep


class Simulated(NamedTuple):
    """Counts of one step on rank 0."""

    moved: dict[str, tuple[int, int]]  # calls and bytes received by name of the exchange
    state_bytes: int  # of tensors before the step
    peak_bytes: int  # of tensors at the fullest moment, of the start or of the step, the batch included
    shapes: dict[str, tuple[int, ...]]  # of this rank's part of the state


def simulate(work: Workload) -> Simulated:
    """A step of rank 0 of work.data x work.feature ranks, without AuxK; in plain torch, whatever the state."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=work.ranks)
    try:
        mesh = from_process_group(MeshConfig(data=work.data, feature=work.feature), "cpu")
        with torch.device("meta"), _Memory() as memory:
            step = _step(work, len(mesh.latents(work.n_latents)), mesh)
            state = memory.now
            x = torch.empty(work.batch, work.d_model, dtype=torch.bfloat16)
            with _Assumed(work):
                _run(step, x)  # the first step also asks how many latents are dead
                before = {name: (m.calls, m.bytes) for name, m in mesh.traffic.items()}
                _run(step, x)
            shapes = {name: tuple(tensor.shape) for name, tensor in step.state_dict().items()}
        moved = {name: (m.calls - before[name][0], m.bytes - before[name][1]) for name, m in mesh.traffic.items()}
        return Simulated(moved, state, memory.peak, shapes)
    finally:
        dist.destroy_process_group()


def _run(step: MeshStep, x: Tensor) -> None:
    """One of the last steps, without the check whether its loss is finite, since there are no values."""
    statistics = step.forward(x.float(), variance=1.0, progress=1.0)
    step.update_(lr=1e-4)
    step.count_(statistics.fired, tokens=len(x))


def _step(work: Workload, n_here: int, mesh: Any) -> MeshStep:
    shard = Shard(
        torch.empty(work.d_model, n_here), torch.empty(n_here, work.d_model), b_enc=torch.empty(n_here),
        b_dec=torch.empty(work.d_model), k=min(work.k, n_here), k_aux=0, aux_coefficient=0.0,
        dead_after_tokens=1 << 40, vectors={spec.name: torch.empty(n_here) for spec in own_vectors(work.sae)},
        backend="torch", state=work.state,
    )  # fmt: skip
    return MeshStep(shard, mesh, sae=work.sae, k_aux=0)


class _Memory(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until the last tensor that sees one is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = self._seen[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


class _Assumed(TorchFunctionMode):
    """Replaces the values that a step reads by assumptions."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.work, self.reaching = work, reaching(work, work.k)
        self.pairs = -(-work.batch * work.k // work.feature)  # of this part's latents, over the whole batch
        self.mine = -(-work.rows * work.k // work.feature)  # the same of the rows of one data rank

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_lines = self.work.in_lines
        match func.__name__, args:
            case "cpu", (tensor,):
                return tensor
            case "tolist", (tensor, *_):
                if tensor.dim() == 2:  # (active, dead, flaws, the loss's two terms) of every rank, or a number of pairs
                    return [[self.mine, 0, 0, 0, 0][: tensor.shape[1]]] * len(tensor)
                if in_lines and len(tensor) == 1 + (1 << DIGIT):  # of every digit: all that are chosen have the last
                    return [self.work.batch * self.work.k] * len(tensor)
                return [self.reaching if len(tensor) == self.work.feature else 0] * len(tensor)
            case "nonzero", (tensor, *_):  # active places, [k, rows] of the batch or of one data rank's rows
                whole = not {self.work.batch, self.work.batch + 1}.isdisjoint(tensor.shape)  # or with a further line
                found = self.pairs if whole else self.mine
                return tuple(torch.empty(min(found, tensor.numel()), dtype=torch.int64) for _ in range(tensor.dim()))
            case "__getitem__", (tensor, Tensor() as mask) if mask.dtype == torch.bool:
                if in_lines and tensor.dtype == torch.int64:  # rows that choose all of their candidates
                    return tensor.new_empty(0)
                return tensor.new_empty(self.reaching)
            case "bincount", (tensor, *_):
                return torch.empty(kwargs["minlength"], dtype=torch.int64)
            case "repeat_interleave", (tensor, *_) if in_lines:  # a row has more latents than its line has places
                return tensor.new_empty(1)
            case "unique_consecutive", (tensor, *_):
                return torch.empty_like(tensor), torch.empty_like(tensor)
            case "__int__", _:  # the most keys that reach the bound in a row; rows that are selected again
                return 0 if in_lines else self.work.k
        return func(*args, **(kwargs or {}))
