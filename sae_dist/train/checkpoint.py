"""Checkpoints: one folder each, complete or absent, hashed; one that does not verify is never loaded.

    <checkpoints>/step_00000500-1f2e3d4c-8be0f1/rank00000-00000.safetensors   blocks of rows, 64 MiB a file at most
    <checkpoints>/step_00000500-1f2e3d4c-8be0f1/checkpoint.json               written last, completes it

Every attempt to save has a folder of its own (checkpoint_folders.py), so a complete checkpoint is never overwritten and
no storage has to rename. Tensors are stored as blocks of consecutive rows (rows are latents), each in one file. It does
not matter which process wrote which, so any number of processes reads what any other number wrote; checkpoint.json
lists the blocks (checkpoint_manifest.py).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sae_dist import faults
from sae_dist.shards.format import xxh3_128
from sae_dist.shards.records import CorruptData
from sae_dist.storage import Storage
from sae_dist.train.checkpoint_manifest import DTYPES, Block, CheckpointManifest, File, TensorLayout, read_manifest

FILE_BYTES = 64 << 20  # most bytes of a file, unless a single row is longer
DAMAGE = (CorruptData, FileNotFoundError)  # other errors of reading do not prove damage


class OwnedRows(NamedTuple):
    """This process's rows of a tensor that several processes share; each owns consecutive rows."""

    local: Tensor  # rows first
    start: int  # the first row's number in the whole tensor
    total: int  # rows of the whole tensor


Tensors = Mapping[str, Tensor | OwnedRows]
RowSelector = Callable[[str, TensorLayout], range | None]  # (name, layout) -> rows that this process owns; None: all


class Checkpoint(NamedTuple):
    """All state that a run resumes from; of split tensors this process's rows."""

    step: int  # steps done
    tensors: Tensors
    facts: dict[str, Any]  # JSON values, the same in every process: input scale, order hash, counters
    scheduled: bool = True  # saved at a regular step; False: saved because the run was asked to stop
    folder: str = ""  # the folder that it was read from


def layout(tensor: Tensor | OwnedRows) -> TensorLayout:
    """Dtype and shape of the whole tensor."""
    local, total = (tensor.local, tensor.total) if isinstance(tensor, OwnedRows) else (tensor, None)
    shape = tuple(local.shape) if total is None else (total, *local.shape[1:])
    return TensorLayout(str(local.dtype).removeprefix("torch."), shape)


def blocks(tensors: Tensors) -> dict[Block, Tensor]:
    """This process's part of every tensor, cut into blocks that fit a file; a scalar is a block of one row."""
    found: dict[Block, Tensor] = {}
    for name, tensor in tensors.items():
        local, first = (tensor.local, tensor.start) if isinstance(tensor, OwnedRows) else (tensor, 0)
        if local.ndim == 0:
            found[Block(name, 0, 1)] = local
            continue
        row_bytes = max(local[:1].numel() * local.element_size(), 1)
        step = max(FILE_BYTES // row_bytes, 1)
        for at in range(0, len(local), step):
            part = local[at : at + step]
            found[Block(name, first + at, len(part))] = part
    return found


def write_files(storage: Storage, folder: str, rank: int, parts: Mapping[Block, Tensor]) -> Iterator[File]:
    """Writes the blocks, several small ones to a file; yields each file once it is written."""
    for number, group in enumerate(_packed(parts)):
        name = f"rank{rank:05d}-{number:05d}.safetensors"
        faults.point("checkpoint.before_file", rank=rank, number=number)
        content = safetensors.torch.save({block.key: parts[block].detach().contiguous().cpu() for block in group})
        storage.write(f"{folder}/{name}", content)
        yield File(name, len(content), xxh3_128(content), tuple(group))


def read_file(storage: Storage, manifest: CheckpointManifest, file: File) -> dict[Block, Tensor]:
    """The blocks of a file, checked against its hash; read up to three times, since transfers can fail too.

    CorruptData where it does not match.
    """
    what = f"{storage.uri}/{manifest.folder}/{file.name}"
    for _ in range(3):
        content = storage.read(f"{manifest.folder}/{file.name}")
        if len(content) == file.bytes and xxh3_128(content) == file.xxh3_128:
            break
    else:
        raise CorruptData(f"{what} does not match its hash")
    try:
        found = safetensors.torch.load(bytes(content))
    except SafetensorError as error:
        raise CorruptData(f"{what}: {error}") from None
    for block in file.blocks:
        whole, part = manifest.tensors[block.name], found.get(block.key)
        shape = (block.rows, *whole.shape[1:]) if whole.shape else ()
        if part is None or (tuple(part.shape), part.dtype) != (shape, DTYPES[whole.dtype]):
            raise CorruptData(f"{what} does not hold {block.rows} rows of {block.name} from row {block.start} on")
    return {block: found[block.key] for block in file.blocks}


def read(storage: Storage, folder: str, owned_rows: RowSelector = lambda *_: None) -> Checkpoint:
    """A checkpoint with, of every tensor, the rows that `owned_rows` selects.

    One of DAMAGE where the folder does not verify.
    """
    manifest = read_manifest(storage, folder)
    wanted = {name: owned_rows(name, whole) for name, whole in manifest.tensors.items()}
    files = [file for file in manifest.files if any(_overlap(block, wanted[block.name]) for block in file.blocks)]
    for file in files:  # before memory is allocated for what they claim to hold
        if (size := storage.size(f"{folder}/{file.name}")) != file.bytes:
            raise CorruptData(f"{storage.uri}/{folder}/{file.name} has {size} bytes, not {file.bytes}")
    parts = {name: _empty(whole, wanted[name]) for name, whole in manifest.tensors.items()}
    for file in files:
        for block, content in read_file(storage, manifest, file).items():
            _copy_(parts[block.name], block, content)
    return Checkpoint(manifest.step, parts, manifest.facts, manifest.scheduled, folder)


def _empty(whole: TensorLayout, rows: range | None) -> Tensor | OwnedRows:
    """An empty tensor for all rows, or for some."""
    dtype = DTYPES[whole.dtype]
    if rows is None:
        return torch.empty(whole.shape, dtype=dtype)
    return OwnedRows(torch.empty(len(rows), *whole.shape[1:], dtype=dtype), rows.start, whole.shape[0])


def _overlap(block: Block, rows: range | None) -> range:
    """The given rows (None: all) that are in the block."""
    of_block = range(block.start, block.start + block.rows)
    return of_block if rows is None else range(max(of_block.start, rows.start), min(of_block.stop, rows.stop))


def _copy_(part: Tensor | OwnedRows, block: Block, content: Tensor) -> None:
    """Copies the block's rows that belong to `part` into it."""
    if not isinstance(part, OwnedRows):
        (part[block.start : block.start + block.rows] if part.ndim else part).copy_(content)
        return
    common = _overlap(block, range(part.start, part.start + len(part.local)))
    if not common:
        return
    part.local[common.start - part.start : common.stop - part.start] = content[
        common.start - block.start : common.stop - block.start
    ]


def _packed(parts: Mapping[Block, Tensor]) -> Iterator[list[Block]]:
    """Blocks in their order, as many to a group as fit a file."""
    group: list[Block] = []
    size = 0
    for block, tensor in parts.items():
        if group and size + tensor.nbytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(block)
        size += tensor.nbytes
    if group:
        yield group
