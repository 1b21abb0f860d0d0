"""Checkpoints: a folder a step, complete or absent, hashed; one that does not verify is never loaded."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
_TENSORS, _MANIFEST = "state.safetensors", "checkpoint.json"


class Checkpoint(NamedTuple):
    """Everything that a run needs to go on as if it had never stopped."""

    step: int  # steps done
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # JSON values: input scale, order hash, counters


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder`/step_N in a temporary folder, makes it durable, and renames it into place."""
    final = folder / _name(checkpoint.step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}, temporary / _TENSORS)
    _sync(temporary / _TENSORS)
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "facts": checkpoint.facts,
        "files": {_TENSORS: {"bytes": (temporary / _TENSORS).stat().st_size, "xxh3_128": _hash(temporary / _TENSORS)}},
    }
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _sync(temporary / _MANIFEST)
    if final.exists():  # left by an attempt that went on from before it, or one that does not verify
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    return final


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None when there is none; says so when a newer one does not."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError) as damage:
            logger.warning("checkpoint %s does not verify (%s); trying the one before", path, damage)
    return None


def prune(folder: Path, keep: int, *, newest: int) -> list[dict[str, Any]]:
    """Removes all but the last `keep` checkpoints up to step `newest`, and what killed saves left; facts of the kept.

    What is past `newest` did not verify when the run went on from before it: it would hide what is written since.
    """
    kept = [path for path in sorted(folder.glob("step_*")) if path.name <= _name(newest)][-keep:]
    for path in set(folder.glob("step_*")) - set(kept):
        shutil.rmtree(path)
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)
    return [json.loads((path / _MANIFEST).read_text())["facts"] for path in kept]


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _read(path: Path) -> Checkpoint:
    manifest: Mapping[str, Any] = json.loads((path / _MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this program reads {FORMAT}")
    for name, expected in manifest["files"].items():
        if (path / name).stat().st_size != expected["bytes"] or _hash(path / name) != expected["xxh3_128"]:
            raise ValueError(f"{name} has changed since it was written")
    return Checkpoint(manifest["step"], load_file(path / _TENSORS), manifest["facts"])


def _hash(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            state.update(block)
    return state.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
