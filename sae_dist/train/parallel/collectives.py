"""The collectives of training: deterministic, with the same bits on every rank.

Sums of floats are computed in rank order from gathered tensors, never by a reduction whose order depends on the library
or the buffer. Tensors are sent as bytes: any dtype, no rounding. Every exchange
has a name under which `mesh.traffic` counts calls, bytes received and seconds. On a GPU an exchange is queued and the
process does not wait for it: its seconds are added at the next `settle_timings`.
"""

import hashlib
import socket
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae_dist.train.parallel.mesh import Axis, GpuTiming, Mesh, Traffic

_all_gather_bytes = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on


def all_gather(mesh: Mesh, axis: Axis, tensor: Tensor, *, name: str) -> Tensor:
    """[size, *shape]: the tensors of all ranks of the axis, which have one shape."""
    if axis.group is None:
        return tensor[None]
    started = _now(tensor)
    mine = tensor.contiguous().view(-1).view(torch.uint8)
    out = mine.new_empty(axis.size * mine.numel())
    _all_gather_bytes(out, mine, group=axis.group)
    _count(mesh, name, (axis.size - 1) * mine.numel(), started, out)
    return out.view(tensor.dtype).view(axis.size, *tensor.shape)


def gather_rows(
    mesh: Mesh, axis: Axis, rows: Shaped[Tensor, "mine ..."], sizes: Sequence[int], *, name: str
) -> Shaped[Tensor, "all ..."]:
    """Concatenates the rows of all ranks of the axis, in rank order; rank r has sizes[r] rows."""
    assert len(rows) == sizes[axis.rank], f"{len(rows)} rows, not {sizes[axis.rank]}"
    if axis.group is None:
        return rows
    longest = max(sizes)
    if len(rows) < longest:
        padded = rows.new_empty(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        rows = padded
    gathered = all_gather(mesh, axis, rows, name=name)
    if min(sizes) == longest:
        return gathered.flatten(0, 1)
    return torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])


def sum_rows(
    mesh: Mesh, axis: Axis, addends: Float[Tensor, "rows width"], sizes: Sequence[int], *, name: str
) -> Float[Tensor, "mine width"]:
    """Reduce-scatter: the sum of all ranks' `addends`, of which rank r gets its sizes[r] rows.

    It is an all-to-all and a sum in rank order: the same traffic, but the bits of a row do not depend on its place in
    the buffer.
    """
    if axis.group is None:
        return addends
    started = _now(addends)
    mine, width = sizes[axis.rank], addends.shape[1]
    out = addends.new_empty(axis.size * mine, width)
    dist.all_to_all_single(
        out, addends.contiguous(), output_split_sizes=[mine] * axis.size, input_split_sizes=list(sizes),
        group=axis.group,
    )  # fmt: skip
    _count(mesh, name, (axis.size - 1) * mine * width * addends.element_size(), started, out)
    return _in_order(out.view(axis.size, mine, width))


def ordered_sum(mesh: Mesh, axis: Axis, addend: Tensor, *, name: str) -> Tensor:
    """The sum over the axis of small tensors, added in rank order."""
    return _in_order(all_gather(mesh, axis, addend, name=name))


def sum_counts(mesh: Mesh, axis: Axis, counts: Int[Tensor, " n"], *, name: str) -> Int[Tensor, " n"]:
    """All-reduce of integers, which is exact in any order."""
    if axis.group is None:
        return counts
    started = _now(counts)
    summed = counts.clone()
    dist.all_reduce(summed, group=axis.group)
    _count(mesh, name, 2 * (axis.size - 1) * summed.numel() * summed.element_size() // axis.size, started, summed)
    return summed


def broadcast_number(mesh: Mesh, number: int, *, name: str) -> int:
    """Rank 0's number, on all ranks."""
    return int(all_gather(mesh, mesh.control, torch.tensor(number, dtype=torch.int64), name=name)[0])


def ranks_on_this_machine(mesh: Mesh) -> int:
    """How many ranks of the mesh run on this machine, this one included."""
    name = int.from_bytes(hashlib.blake2b(socket.gethostname().encode(), digest_size=8).digest(), "little", signed=True)
    return int((all_gather(mesh, mesh.control, torch.tensor(name), name="machines") == name).sum())


def _in_order(addends: Shaped[Tensor, "size ..."]) -> Shaped[Tensor, "..."]:
    out = addends[0]
    for addend in addends[1:]:
        out = out + addend
    return out


def settle_timings(mesh: Mesh) -> None:
    """Adds the seconds of exchanges on a GPU to `mesh.traffic`; call it when the GPU's queue is done."""
    for traffic, begun, ended in mesh.gpu_timings:
        traffic.seconds += begun.elapsed_time(ended) / 1000
    mesh.gpu_timings.clear()


def _now(tensor: Tensor) -> float | torch.cuda.Event:
    """The time: the process's clock, or an event in the queue of the tensor's GPU."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _count(mesh: Mesh, name: str, received: int, started: float | torch.cuda.Event, of: Tensor) -> None:
    traffic = mesh.traffic.setdefault(name, Traffic())
    traffic.calls += 1
    traffic.bytes += received
    ended = _now(of)
    if isinstance(started, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        mesh.gpu_timings.append(GpuTiming(traffic, started, ended))
    elif isinstance(started, float) and isinstance(ended, float):
        traffic.seconds += ended - started
