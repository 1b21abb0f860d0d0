"""Checkpoints: a folder each, complete or not there, hashed; one that does not verify is never loaded.

    <checkpoints>/step_00000500-3fa9c1/rank00000-00000.safetensors   blocks of rows, 64 MiB a file at most
    <checkpoints>/step_00000500-3fa9c1/checkpoint.json               written last; without it there is no checkpoint

Every attempt to save has a folder of its own, so nothing that counts is ever overwritten, and no storage has to rename.
Tensors lie as blocks of consecutive rows (latents first), each in one file; who wrote which does not matter, so any
number of processes reads what any other number wrote. checkpoint.json carries the hash of every file and of itself.
"""

import logging
import math
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sae_dist import faults
from sae_dist.config import UserError
from sae_dist.shards.format import CorruptData, read_record, seal, xxh3_128
from sae_dist.storage import Storage, StorageError

logger = logging.getLogger(__name__)

FORMAT = 4
FILE_BYTES = 64 << 20  # of a file, and so of what is read for one row; a single longer row makes a longer file
MANIFEST = "checkpoint.json"
DAMAGE = (CorruptData, FileNotFoundError)  # bytes that are not what was written; that none could be read is no proof


class Rows(NamedTuple):
    """This process's rows of a tensor that several processes hold together, each some consecutive rows."""

    local: Tensor  # rows first
    start: int  # of the first of them in the whole
    total: int  # rows of the whole


Tensors = Mapping[str, Tensor | Rows]


class Checkpoint(NamedTuple):
    """Everything that a run needs to go on as if it had never stopped; of the tensors, what this process holds."""

    step: int  # steps done
    tensors: Tensors
    facts: dict[str, Any]  # JSON values, the same in every process: input scale, order hash, counters
    folder: str = ""  # that it was read from


class Block(NamedTuple):
    """Consecutive rows of one tensor, in one file."""

    name: str
    start: int
    rows: int

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


class File(NamedTuple):
    """A file of a checkpoint: safetensors, one entry a block."""

    name: str
    bytes: int
    xxh3_128: str
    blocks: tuple[Block, ...]


class Layout(NamedTuple):
    """A tensor as a whole."""

    dtype: str  # float32, int64, ...
    shape: tuple[int, ...]


class Manifest(NamedTuple):
    """What checkpoint.json says."""

    folder: str
    step: int
    facts: dict[str, Any]
    tensors: dict[str, Layout]
    files: tuple[File, ...]


def new_folder(step: int) -> str:
    """A folder that no other attempt has."""
    return f"{_prefix(step)}-{secrets.token_hex(3)}"


def layout(tensor: Tensor | Rows) -> Layout:
    """The whole that a process's part belongs to."""
    local, total = (tensor.local, tensor.total) if isinstance(tensor, Rows) else (tensor, None)
    shape = tuple(local.shape) if total is None else (total, *local.shape[1:])
    return Layout(str(local.dtype).removeprefix("torch."), shape)


def blocks(tensors: Tensors) -> dict[Block, Tensor]:
    """This process's part of every tensor, cut into blocks that fit a file; a scalar is one row of nothing else."""
    found: dict[Block, Tensor] = {}
    for name, tensor in tensors.items():
        local, first = (tensor.local, tensor.start) if isinstance(tensor, Rows) else (tensor, 0)
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
    """Writes the blocks, several to a file where they are small; each file as it is there.

    UserError for numbers that are not finite: a run that goes back must find weights to go back to.
    """
    for block, part in parts.items():
        if part.is_floating_point() and not part.isfinite().all():
            raise UserError(f"{block.name} holds numbers that are not finite; lower the learning rate")
    for number, group in enumerate(_packed(parts)):
        name = f"rank{rank:05d}-{number:05d}.safetensors"
        faults.point("checkpoint.before_file", rank=rank, number=number)
        content = safetensors.torch.save({block.key: parts[block].detach().contiguous().cpu() for block in group})
        storage.write(f"{folder}/{name}", content)
        yield File(name, len(content), xxh3_128(content), tuple(group))


def commit(storage: Storage, manifest: Manifest) -> None:
    """Makes the checkpoint count: from here on it is what a run goes on from."""
    held = {name: sum(b.rows for f in manifest.files for b in f.blocks if b.name == name) for name in manifest.tensors}
    missing = [name for name, whole in manifest.tensors.items() if held[name] != (whole.shape or (1,))[0]]
    assert not missing, f"{missing} would not be whole in {manifest.folder}"
    record = {
        "format": FORMAT,
        "step": manifest.step,
        "facts": manifest.facts,
        "tensors": {name: tensor._asdict() for name, tensor in manifest.tensors.items()},
        "files": [file._asdict() for file in manifest.files],
    }
    faults.point("checkpoint.before_commit", step=manifest.step)
    if not storage.create(f"{manifest.folder}/{MANIFEST}", seal(record)):
        raise StorageError(
            f"{storage.uri}/{manifest.folder} was committed by another process; is the run started twice?"
        )
    faults.point("checkpoint.after_commit", step=manifest.step)


def save(storage: Storage, checkpoint: Checkpoint) -> str:
    """Writes the checkpoint of a single process, whole; its folder."""
    folder = new_folder(checkpoint.step)
    files = tuple(write_files(storage, folder, 0, blocks(checkpoint.tensors)))
    tensors = {name: layout(tensor) for name, tensor in checkpoint.tensors.items()}
    commit(storage, Manifest(folder, checkpoint.step, checkpoint.facts, tensors, files))
    return folder


def folders(storage: Storage, among: Callable[[Manifest], bool] | None = None) -> list[str]:
    """The folders of complete checkpoints, newest first; with `among`, those whose manifest reads well and fits."""
    keys = (entry.key for entry in storage.list("step_"))
    found = [key.removesuffix(f"/{MANIFEST}") for key in keys if re.fullmatch(rf"step_\d+-\w+/{MANIFEST}", key)]
    if among is not None:
        found = [folder for folder in found if _fits(storage, folder, among)]
    return sorted(found, key=lambda folder: (step_of(folder), folder), reverse=True)


def _fits(storage: Storage, folder: str, among: Callable[[Manifest], bool]) -> bool:
    try:
        return among(read_manifest(storage, folder))
    except DAMAGE as damage:
        logger.warning("checkpoint %s/%s does not verify (%s); passing over it", storage.uri, folder, damage)
        return False


def step_of(folder: str) -> int:
    return int(folder.removeprefix("step_").partition("-")[0])


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """checkpoint.json of a folder; one of DAMAGE when it is not what was written, UserError for another format."""
    what = f"{storage.uri}/{folder}/{MANIFEST}"
    record = read_record(storage, f"{folder}/{MANIFEST}", what)
    if record["format"] != FORMAT:
        raise UserError(
            f"{what} has format {record['format']}, this program reads {FORMAT}; go on with the program that wrote it, "
            "or choose another out= (and train.checkpoints=)"
        )
    files = tuple(File(**(f | {"blocks": tuple(Block(*block) for block in f["blocks"])})) for f in record["files"])
    tensors = {name: Layout(whole["dtype"], tuple(whole["shape"])) for name, whole in record["tensors"].items()}
    return Manifest(folder, record["step"], record["facts"], tensors, files)


def read_file(storage: Storage, folder: str, file: File) -> dict[Block, Tensor]:
    """The blocks of a file that is what was written; read up to three times, for bits also flip on the way."""
    for _ in range(3):
        content = storage.read(f"{folder}/{file.name}")
        if len(content) == file.bytes and xxh3_128(content) == file.xxh3_128:
            found = safetensors.torch.load(bytes(content))
            return {block: found[block.key] for block in file.blocks}
    raise CorruptData(f"{storage.uri}/{folder}/{file.name} is not what was written")


def read(storage: Storage, folder: str, mine: Callable[[str, Layout], range | None] = lambda *_: None) -> Checkpoint:
    """What one process holds of a checkpoint: of every tensor the rows that `mine` says, all where it says None.

    One of DAMAGE when the folder is not what was written.
    """
    manifest = read_manifest(storage, folder)
    parts = {name: empty(whole, mine(name, whole)) for name, whole in manifest.tensors.items()}
    for file in manifest.files:
        if any(overlap(block, parts[block.name]) for block in file.blocks):
            for block, content in read_file(storage, folder, file).items():
                copy_(parts[block.name], block, content)
    return Checkpoint(manifest.step, parts, manifest.facts, folder)


def empty(whole: Layout, rows: range | None) -> Tensor | Rows:
    """Room for all rows of a tensor, or for some."""
    dtype = getattr(torch, whole.dtype)
    if rows is None:
        return torch.empty(whole.shape, dtype=dtype)
    return Rows(torch.empty(len(rows), *whole.shape[1:], dtype=dtype), rows.start, whole.shape[0])


def overlap(block: Block, part: Tensor | Rows) -> range:
    """The rows of the whole that are in the block and in the part."""
    start, rows = (part.start, len(part.local)) if isinstance(part, Rows) else (0, max(math.prod(part.shape[:1]), 1))
    return range(max(block.start, start), min(block.start + block.rows, start + rows))


def copy_(part: Tensor | Rows, block: Block, content: Tensor) -> None:
    """Puts into the part what the block has of it."""
    common = overlap(block, part)
    if not common:
        return
    local, start = (part.local, part.start) if isinstance(part, Rows) else (part, 0)
    if local.ndim == 0:
        local.copy_(content)
        return
    local[common.start - start : common.stop - start] = content[common.start - block.start : common.stop - block.start]


def latest(
    storage: Storage,
    load: Callable[[Storage, str], Checkpoint] = read,
    *,
    among: Callable[[Manifest], bool] | None = None,
) -> Checkpoint | None:
    """The newest checkpoint that verifies, None when there is none; says so when a newer one does not.

    UserError when there are some and none verifies; what the storage raises when it gives none away.
    """
    there = folders(storage, among)
    for folder in there:
        try:
            return load(storage, folder)
        except DAMAGE as damage:
            passed_over(storage, folder, damage)
        except OSError as error:
            raise refusal(storage, folder, error) from None
    return none_left(storage, there)


def passed_over(storage: Storage, folder: str, damage: object) -> None:
    """Says that a checkpoint is damaged and the one before is tried."""
    logger.warning("checkpoint %s/%s does not verify (%s); trying the one before", storage.uri, folder, damage)


def refusal(storage: Storage, folder: str, error: OSError) -> StorageError:
    """What to raise for a checkpoint of which nobody knows whether it is damaged: an older one would undo work."""
    return StorageError(
        f"checkpoint {storage.uri}/{folder} cannot be read ({error}); repeat the command when it can, or remove that "
        "folder to go on from the one before"
    )


def none_left(storage: Storage, there: Collection[str]) -> None:
    """UserError if there are checkpoints: to begin anew, and remove them, is not for the program to decide."""
    if there:
        raise UserError(
            f"none of the {len(there)} checkpoints in {storage.uri} is what was written there; remove that folder to "
            "begin anew, or choose another out= (and train.checkpoints=)"
        )


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


def _prefix(step: int) -> str:
    return f"step_{step:08d}"
