"""checkpoint.json: the tensors and files of a checkpoint with their hashes; written last."""

import math
from collections import defaultdict
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from sae_dist import config, faults
from sae_dist.config import UserError
from sae_dist.shards import records
from sae_dist.shards.records import CorruptData, seal
from sae_dist.storage import Storage, StorageError
from sae_dist.train.checkpoint_folders import MANIFEST, MANIFEST_BYTES, OWN_FILE, step_of

FORMAT = 7
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip
Count = Annotated[int, Field(ge=0)]


class Block(NamedTuple):
    """Consecutive rows of one tensor, in one file; a scalar is one row."""

    name: str
    start: Count
    rows: Count

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


class File(NamedTuple):
    """A file of a checkpoint: safetensors, one entry a block."""

    name: str
    bytes: Count
    xxh3_128: str
    blocks: tuple[Block, ...]


class TensorLayout(NamedTuple):
    """A tensor as a whole."""

    dtype: str  # float32, int64, ...
    shape: tuple[Count, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


class CheckpointManifest(NamedTuple):
    """What checkpoint.json says."""

    folder: str
    step: Count
    scheduled: bool  # saved because its step was due, not because the run was asked to stop
    facts: dict[str, Any]
    tensors: dict[str, TensorLayout]
    files: tuple[File, ...]


def commit(storage: Storage, manifest: CheckpointManifest) -> None:
    """Completes the checkpoint: from now on a run resumes from it. StorageError where it is complete already."""
    if wrong := _flaw(manifest):
        raise AssertionError(f"{manifest.folder} would not be whole: {wrong}")
    record = manifest._asdict() | {
        "format": FORMAT,
        "tensors": {name: tensor._asdict() for name, tensor in manifest.tensors.items()},
        "files": [file._asdict() for file in manifest.files],
    }
    faults.point("checkpoint.before_commit", step=manifest.step)
    if not storage.create(f"{manifest.folder}/{MANIFEST}", seal(record)):
        raise StorageError(
            f"{storage.uri}/{manifest.folder} was committed by another process; is the run started twice?"
        )
    faults.point("checkpoint.after_commit", step=manifest.step)


def read_manifest(storage: Storage, folder: str) -> CheckpointManifest:
    """checkpoint.json of a folder, checked: its tensors are whole, its file names allowed, its folder this one.

    CorruptData or FileNotFoundError where it does not verify, UserError for another format.
    """
    what = f"{storage.uri}/{folder}/{MANIFEST}"
    record = records.read(storage, f"{folder}/{MANIFEST}", what, most=MANIFEST_BYTES)
    del record["digest"]
    if (found := record.pop("format", None)) != FORMAT:
        raise UserError(
            f"{what} has format {found}, this program reads {FORMAT}; resume with the program that wrote it, "
            "or choose another out= (and train.checkpoints=)"
        )
    try:
        manifest = config.load(CheckpointManifest, record)
    except UserError as error:
        raise CorruptData(f"{what}: {error}") from None
    wrong = _flaw(manifest)
    if manifest.folder != folder:
        wrong = f"it was written as {manifest.folder}"
    if wrong:
        raise CorruptData(f"{what}: {wrong}")
    return manifest


def _flaw(manifest: CheckpointManifest) -> str | None:
    """What is wrong with a manifest whose fields have the right types; None if nothing is."""
    if manifest.step != step_of(manifest.folder):
        return f"step={manifest.step} in {manifest.folder}"
    if unknown := sorted({whole.dtype for whole in manifest.tensors.values()} - DTYPES.keys()):
        return f"dtype={unknown[0]} is none of {', '.join(DTYPES)}"
    held: dict[str, list[Block]] = defaultdict(list)
    for file in manifest.files:
        if not OWN_FILE.fullmatch(file.name):
            return f"{file.name!r} is no file of a checkpoint"
        for block in file.blocks:
            held[block.name].append(block)
        if unknown := [block.name for block in file.blocks if block.name not in manifest.tensors]:
            return f"{file.name} has rows of {unknown[0]}, which is no tensor of it"
        if sum(block.rows * manifest.tensors[block.name].row_bytes for block in file.blocks) > file.bytes:
            return f"{file.name} of {file.bytes} bytes is too small for its rows"
    for name, whole in manifest.tensors.items():
        end = 0
        for block in sorted(held[name], key=lambda block: block.start):
            if block.start != end:
                break
            end += block.rows
        if end != whole.rows:
            return f"{name} has no row {end}"
    return None
