"""Checkpoints of a mesh: any mesh reads what any other wrote, and one rank's failure is everybody's.

torch.distributed.checkpoint plans and agrees (planner.py); a single process has nothing to agree on.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, cast

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


class Checkpoints:
    """The checkpoints in one place, as all ranks of a mesh write and read them together: all call the same methods."""

    def __init__(self, mesh: Mesh, storage: Storage, *, timeout_s: float) -> None:
        """`timeout_s` is how long a rank that has written its part waits for the others."""
        self.storage = storage
        self._group: dist.ProcessGroup | None = None
        if mesh.world.group is not None:  # one for checkpoints alone: a thread may use it while the mesh trains
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._group = cast(dist.ProcessGroup, group)  # every rank is in it

    def save(self, state: Checkpoint) -> str:
        """Writes what each rank holds; returns on every rank once the checkpoint counts, with its folder.

        StorageError on all ranks when one could not write.
        """
        if self._group is None:
            return checkpoint.save(self.storage, state)
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save as save_together

        from sae_dist.train.parallel.planner import RowsSavePlanner, Writer

        writer = Writer(self.storage, state, dist.get_rank(self._group))
        try:
            save_together(
                dict(state.tensors), storage_writer=writer, planner=RowsSavePlanner(), process_group=self._group
            )
        except CheckpointException as failed:
            raise StorageError(_reasons(failed, (OSError, ValueError))) from None
        return writer.folder

    def latest(self, mine: "Mine", *, among: Callable[[Manifest], bool] | None = None) -> Checkpoint | None:
        """What this rank holds of the newest checkpoint that verifies on all ranks; None when there is none.

        `among` says which ones count; those whose manifest is damaged do not.
        """
        if self._group is None:
            return checkpoint.latest(
                self.storage, lambda place, folder: checkpoint.read(place, folder, mine), among=among
            )
        first = dist.get_rank(self._group) == 0
        lists: list[list[str] | None] = [checkpoint.folders(self.storage, among) if first else None]
        dist.broadcast_object_list(lists, group_src=0, group=self._group)  # one list: a storage may show a file late
        for folder in lists[0] or []:
            try:
                return self._load(folder, mine)
            except CorruptData as damage:
                if first:
                    checkpoint.passed_over(self.storage, folder, damage)
            except OSError as error:
                raise checkpoint.refusal(self.storage, folder, error) from None
        return checkpoint.none_left(self.storage, lists[0] or [])

    def _load(self, folder: str, mine: "Mine") -> Checkpoint:
        """What this rank holds of a checkpoint; CorruptData on all ranks when one found it damaged."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load as load_together

        from sae_dist.train.parallel.planner import Reader, RowsLoadPlanner

        planner, reader = RowsLoadPlanner(mine), Reader(self.storage, folder)
        try:
            load_together({}, storage_reader=reader, planner=planner, process_group=self._group)
        except CheckpointException as failed:
            raise CorruptData(_reasons(failed, checkpoint.DAMAGE)) from None
        return Checkpoint(reader.manifest.step, planner.parts, reader.manifest.facts, folder)


def _reasons(failed: "CheckpointException", expected: tuple[type[Exception], ...]) -> str:
    """What went wrong, by rank; an error of another kind than those is raised as it is."""
    for _, (error, _) in sorted(failed.failures.items()):
        if not isinstance(error, expected):
            raise error
    return "; ".join(f"rank {rank}: {error}" for rank, (error, _) in sorted(failed.failures.items()))
