"""Checkpoints of a mesh: any mesh reads what any other wrote, and an error on one rank is raised on all.

Ranks exchange which blocks of rows they hold; a block that several hold is written by the one with the least to write.
Each rank writes its files, then rank 0 writes the manifest. For reading, each rank takes the blocks that overlap with
its rows. A single process does the same without exchanges.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from sae_dist.config import UserError
from sae_dist.shards.records import CorruptData
from sae_dist.storage import Storage, StorageError, Unavailable
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import DAMAGE, Checkpoint, RowSelector
from sae_dist.train.checkpoint_folders import folders, is_of, new_folder
from sae_dist.train.checkpoint_manifest import Block, CheckpointManifest, File, commit, read_manifest
from sae_dist.train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """Why a rank could not do its part; `unanswered`: its storage did not answer in time."""

    why: str
    unanswered: bool = False


class Checkpoints:
    """The checkpoints of one run in one storage. All ranks of the mesh call every method together."""

    def __init__(self, mesh: Mesh, storage: Storage, run_id: str, *, timeout_s: float = 1800.0) -> None:
        """`run_id` is part of the run's folder names; a rank waits `timeout_s` for the others."""
        self.storage, self.run_id = storage, run_id
        self._rank, self._world = mesh.world.rank, mesh.world.size
        self._group: dist.ProcessGroup | None = None
        if mesh.world.group is not None:  # a group of its own, since a thread uses it while the mesh trains
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._group = cast(dist.ProcessGroup, group)  # every rank is in it

    def save(self, state: Checkpoint) -> str:
        """Writes every rank's part and returns the folder on all ranks once the checkpoint is complete.

        StorageError on all ranks where one could not write, Unavailable if only for want of an answer.
        """
        parts = checkpoint.blocks(state.tensors)
        sizes = [[*block, part.nbytes] for block, part in parts.items()]
        told = self._exchange([new_folder(state.step, self.run_id), sizes])
        folder = told[0][0]
        mine = assigned_blocks([{Block(*block): size for *block, size in sizes} for _, sizes in told], self._rank)
        files, failure = [], None
        try:
            files = list(checkpoint.write_files(self.storage, folder, self._rank, {b: parts[b] for b in mine}))
        except (OSError, ValueError) as error:  # a StorageError is a ValueError
            failure = _failure(error)
        told = self._exchange([failure, files])
        _raise_any(StorageError, [failure for failure, _ in told])
        if self._rank == 0:
            written = tuple(
                File(name, size, xxh3, tuple(Block(*block) for block in blocks))
                for _, files in told
                for name, size, xxh3, blocks in files
            )
            tensors = {name: checkpoint.layout(tensor) for name, tensor in state.tensors.items()}
            try:
                manifest = CheckpointManifest(folder, state.step, state.scheduled, state.facts, tensors, written)
                commit(self.storage, manifest)
            except (OSError, ValueError) as error:
                failure = _failure(error)
        _raise_any(StorageError, self._exchange(failure))
        return folder

    def latest(
        self, owned_rows: RowSelector = lambda *_: None, *, accept: Callable[[CheckpointManifest], bool] | None = None
    ) -> Checkpoint | None:
        """What this rank holds of the run's newest checkpoint that verifies on all ranks; None when there is none.

        `accept` chooses by manifest; one whose manifest is damaged is passed over. Logs a warning for a newer one that
        does not verify. UserError when there are some and none verifies, since only a person may decide to remove them
        and begin anew, and when one cannot be read, since it may be sound.
        """
        # rank 0's list for all: other ranks may see a new file later
        there = self._exchange(self._candidates(accept) if self._rank == 0 else None)[0]
        for folder in there:
            try:
                return self._read(folder, owned_rows)
            except CorruptData as damage:
                if self._rank == 0:
                    logger.warning(
                        "checkpoint %s/%s does not verify (%s); trying the one before", self.storage.uri, folder, damage
                    )
        if there:
            raise UserError(
                f"none of the {len(there)} checkpoints in {self.storage.uri} is undamaged; remove that "
                "folder to begin anew, or choose another out= (and train.checkpoints=)"
            )
        return None

    def facts_of_another_run(self) -> dict[str, Any] | None:
        """The facts of the newest checkpoint of another run in this storage; None where there is none.

        UserError where it has another format.
        """
        facts = refusal = None
        if self._rank == 0:
            try:
                facts = next(self._readable_facts(), None)
            except UserError as error:
                refusal = _failure(error)
        facts, refusal = self._exchange([facts, refusal])[0]
        _raise_any(UserError, [refusal])
        return facts

    def _readable_facts(self) -> Iterator[dict[str, Any]]:
        for folder in folders(self.storage):
            if not is_of(folder, self.run_id):
                with contextlib.suppress(*DAMAGE):  # it is not resumed from
                    yield read_manifest(self.storage, folder).facts

    def _candidates(self, accept: Callable[[CheckpointManifest], bool] | None) -> list[str]:
        return [folder for folder in folders(self.storage, self.run_id) if accept is None or self._fits(folder, accept)]

    def _fits(self, folder: str, accept: Callable[[CheckpointManifest], bool]) -> bool:
        try:
            return accept(read_manifest(self.storage, folder))
        except DAMAGE as damage:
            logger.warning(
                "checkpoint %s/%s does not verify (%s); not rolling back to it", self.storage.uri, folder, damage
            )
            return False

    def _read(self, folder: str, owned_rows: RowSelector) -> Checkpoint:
        """CorruptData on all ranks where one found damage, StorageError where one could not read.

        Unavailable if only for want of an answer.
        """
        read, damage, refusal = None, None, None
        try:
            read = checkpoint.read(self.storage, folder, owned_rows)
        except DAMAGE as error:
            damage = _failure(error)
        except OSError as error:  # it may be sound: resuming from an older one would lose work
            refusal = Failure(
                f"checkpoint {self.storage.uri}/{folder} cannot be read ({error}); repeat the command when it can, or "
                "remove that folder to resume from the one before"
            )
        except UserError as error:
            refusal = _failure(error)
        told = self._exchange([damage, refusal])
        _raise_any(CorruptData, [damage for damage, _ in told])
        _raise_any(StorageError, [refusal for _, refusal in told])
        assert read is not None
        return read

    def _exchange(self, value: Any) -> list[Any]:
        """All-gathers JSON values, in rank order."""
        if self._group is None:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._group)
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=self._group)
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def assigned_blocks(held: Sequence[Mapping[Block, int]], rank: int) -> list[Block]:
    """The blocks that `rank` writes, from the blocks (and bytes) that each rank holds; every block has one writer.

    A block that several ranks hold goes to the one with the least to write.
    """
    holders: dict[Block, list[int]] = {}
    for holder, blocks in enumerate(held):
        for block in blocks:
            holders.setdefault(block, []).append(holder)
    load, mine = [0] * len(held), []
    for block, ranks in sorted(holders.items(), key=lambda item: len(item[1])):  # blocks with one holder first
        writer = min(ranks, key=lambda holder: load[holder])
        load[writer] += held[writer][block]
        if writer == rank:
            mine.append(block)
    return mine


def _failure(error: Exception) -> Failure:
    return Failure(str(error), isinstance(error, Unavailable))


def _raise_any(kind: type[UserError], told: Sequence[Sequence[Any] | None]) -> None:
    """Raises the failures that all ranks told, if there are any, as one; names the ranks if there are several."""
    failures = {rank: Failure(*each) for rank, each in enumerate(told) if each is not None}
    if failures:
        kind = Unavailable if all(each.unanswered for each in failures.values()) else kind
        alone = len(told) == 1
        raise kind("; ".join(each.why if alone else f"rank {rank}: {each.why}" for rank, each in failures.items()))
