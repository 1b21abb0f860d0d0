"""Who writes and who reads what of a checkpoint: the planner of torch.distributed.checkpoint, over our own files.

It leaves what several ranks hold to the one with the least to write, and finds the blocks that overlap with what a rank
wants, whatever mesh wrote them. Writing and reading are ours (checkpoint.py): safetensors and JSON where torch's own
storage pickles, every file hashed, the manifest last. Importing this costs as much as importing torch.
"""

import dataclasses
import io
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from sae_dist.storage import Storage
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import Block, Checkpoint, File, Layout, Manifest, Rows

Mine = Callable[[str, Layout], range | None]  # of a tensor, the rows that this rank holds; None: all


class RowsSavePlanner(SavePlanner):
    """Blocks of rows as torch's planner sees them: shards of a tensor."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        del storage_meta, is_coordinator
        self._tensors: dict[str, Tensor | Rows] = state_dict
        self._parts = {_index(block, part.ndim): part for block, part in checkpoint.blocks(state_dict).items()}

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, part in self._parts.items():
            whole = checkpoint.layout(self._tensors[index.fqn])
            data = TensorWriteData(
                _chunk(index, part.shape), TensorProperties(dtype=part.dtype), torch.Size(whole.shape)
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(dedup_save_plans(all_plans))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._parts[write_item.index]


class Writer(StorageWriter):
    """A rank's blocks into files, and on the coordinator the manifest."""

    def __init__(self, storage: Storage, state: Checkpoint, rank: int) -> None:
        self._storage, self._state, self._rank = storage, state, rank
        self.folder = ""

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        del checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        del is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        folder = checkpoint.new_folder(self._state.step)
        return [dataclasses.replace(plan, storage_data=folder) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.folder = plan.storage_data
        parts: dict[Block, Tensor] = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor)
            parts[_block(item.index, data)] = data
        files = checkpoint.write_files(self._storage, self.folder, self._rank, parts)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(file.name), file.bytes, file) for file in files])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = tuple(result.storage_data for written in results for result in written)
        tensors = {}
        for name, whole in metadata.state_dict_metadata.items():
            assert isinstance(whole, TensorStorageMetadata)
            tensors[name] = Layout(str(whole.properties.dtype).removeprefix("torch."), tuple(whole.size))
        checkpoint.commit(
            self._storage, Manifest(self.folder, self._state.step, dict(self._state.facts), tensors, files)
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        del checkpoint_id  # torch never has to guess which storage to use
        return False


class RowsLoadPlanner(LoadPlanner):
    """Room for what this rank wants, and the saved blocks that overlap with it."""

    def __init__(self, mine: Mine) -> None:
        self._mine = mine
        self.parts: dict[str, Tensor | Rows] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        del state_dict, is_coordinator
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, whole in self._metadata.state_dict_metadata.items():
            assert isinstance(whole, TensorStorageMetadata)
            laid = Layout(str(whole.properties.dtype).removeprefix("torch."), tuple(whole.size))
            part = self.parts[name] = checkpoint.empty(laid, self._mine(name, laid))
            local, start = (part.local, part.start) if isinstance(part, Rows) else (part, 0)
            wanted = _chunk(_index(Block(name, start, len(local) if local.ndim else 1), local.ndim), local.shape)
            items += create_read_items_for_chunk_list(name, whole, [wanted])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn} is {value}, not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.parts[read_item.dest_index.fqn]
        return part.local if isinstance(part, Rows) else part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class Reader(StorageReader):
    """Files that are what was written, and of them the blocks that the plan asks for."""

    manifest: Manifest

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        del checkpoint_id

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        self.manifest = manifest = checkpoint.read_manifest(self._storage, self._folder)
        self._file_of: dict[MetadataIndex, File] = {}
        chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in manifest.tensors}
        for file in manifest.files:
            for block in file.blocks:
                shape = manifest.tensors[block.name].shape
                index = _index(block, len(shape))
                chunks[block.name].append(_chunk(index, torch.Size((block.rows, *shape[1:]) if shape else ())))
                self._file_of[index] = file
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, whole.dtype)), torch.Size(whole.shape), chunks[name]
                )
                for name, whole in manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        del metadata, is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[File, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._file_of[item.storage_index], []).append(item)
        for file, items in by_file.items():
            content = {
                _index(block, part.ndim): part
                for block, part in checkpoint.read_file(self._storage, self._folder, file).items()
            }
            for item in items:
                target = planner.resolve_tensor(item)
                _narrow(target, item.dest_offsets, item.lengths).copy_(
                    _narrow(content[item.storage_index], item.storage_offsets, item.lengths)
                )
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        del checkpoint_id  # torch never has to guess which storage to use
        return False


def _index(block: Block, ndim: int) -> MetadataIndex:
    """torch's name of a block: a tensor and the place of the block's first element in it."""
    return MetadataIndex(block.name, (block.start, *[0] * (ndim - 1))[:ndim])


def _block(index: MetadataIndex, part: Tensor) -> Block:
    return Block(index.fqn, index.offset[0] if index.offset else 0, len(part) if part.ndim else 1)


def _chunk(index: MetadataIndex, shape: torch.Size) -> ChunkStorageMetadata:
    assert index.offset is not None
    return ChunkStorageMetadata(index.offset, shape)


def _narrow(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor
