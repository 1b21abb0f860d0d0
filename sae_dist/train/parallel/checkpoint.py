"""Checkpoints of a mesh: any mesh reads what any other wrote, and one rank's failure is everybody's.

torch.distributed.checkpoint plans and agrees (planner.py); a single process has nothing to agree on.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from sae_dist.shards.format import CorruptData
from sae_dist.storage import Storage, StorageError
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import Checkpoint, Manifest
from sae_dist.train.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

    from sae_dist.train.parallel.planner import Mine

logger = logging.getLogger(__name__)


def group_of(mesh: Mesh, timeout_s: float) -> dist.ProcessGroup | None:
    """A group for checkpoints alone, so that a thread may use it while the mesh trains; every rank calls this once.

    `timeout_s` is how long a rank that has written its part waits for the others.
    """
    if mesh.world.group is None:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))  # type: ignore[return-value]


def save(group: dist.ProcessGroup | None, storage: Storage, state: Checkpoint) -> str:
    """Writes what each rank holds; returns on every rank once the checkpoint counts, with its folder.

    StorageError on all ranks when one could not write.
    """
    if group is None:
        return checkpoint.save(storage, state)
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save as save_together

    from sae_dist.train.parallel.planner import RowsSavePlanner, Writer

    writer = Writer(storage, state, dist.get_rank(group))
    try:
        save_together(dict(state.tensors), storage_writer=writer, planner=RowsSavePlanner(), process_group=group)
    except CheckpointException as failed:
        raise StorageError(_reasons(failed, (OSError, ValueError))) from None
    return writer.folder


def load(group: dist.ProcessGroup | None, storage: Storage, folder: str, mine: "Mine") -> Checkpoint:
    """What this rank holds of a checkpoint; CorruptData on all ranks when one found it damaged."""
    if group is None:
        return checkpoint.read(storage, folder, mine)
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load as load_together

    from sae_dist.train.parallel.planner import Reader, RowsLoadPlanner

    planner, reader = RowsLoadPlanner(mine), Reader(storage, folder)
    try:
        load_together({}, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as failed:
        raise CorruptData(_reasons(failed, checkpoint.DAMAGE)) from None
    return Checkpoint(reader.manifest.step, planner.parts, reader.manifest.facts, folder)


def latest(
    group: dist.ProcessGroup | None, storage: Storage, mine: "Mine", *, among: Callable[[Manifest], bool] | None = None
) -> Checkpoint | None:
    """The newest checkpoint that verifies on all ranks, the same on all; None when there is none.

    `among` says which ones count; those whose manifest is damaged do not.
    """
    if group is None:
        return checkpoint.latest(storage, lambda place, folder: checkpoint.read(place, folder, mine), among=among)
    lists: list[list[str] | None] = [checkpoint.folders(storage, among) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(lists, group_src=0, group=group)  # one list: storages may show a new file late
    for folder in lists[0] or []:
        try:
            return load(group, storage, folder, mine)
        except CorruptData as damage:
            if dist.get_rank(group) == 0:
                checkpoint.passed_over(storage, folder, damage)
        except OSError as error:
            raise checkpoint.refusal(storage, folder, error) from None
    return checkpoint.none_left(storage, lists[0] or [])


def _reasons(failed: "CheckpointException", expected: tuple[type[Exception], ...]) -> str:
    """What went wrong, by rank; an error of another kind than those is raised as it is."""
    for _, (error, _) in sorted(failed.failures.items()):
        if not isinstance(error, expected):
            raise error
    return "; ".join(f"rank {rank}: {error}" for rank, (error, _) in sorted(failed.failures.items()))
