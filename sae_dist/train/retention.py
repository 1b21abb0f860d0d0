"""Which checkpoints stay: the last ones that are sound, and milestones. Everything else goes."""

import logging
import shutil
from collections.abc import Collection
from typing import NamedTuple

from sae_dist.storage import Storage
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import Manifest

logger = logging.getLogger(__name__)


class Retention(NamedTuple):
    """Which checkpoints stay."""

    keep: int  # the last so many
    every: int  # and those whose step it divides; 0: no others


def prune(storage: Storage, *, sound: Collection[str], keep: int, every: int = 0) -> list[Manifest]:
    """Removes all but the last `keep` sound checkpoints and those of them whose step `every` divides.

    `sound`: the folder that the run went on from, and those that it wrote since. Older ones count as long as their
    manifest verifies; any other of these steps did not verify when the run went on from before it, and would hide what
    is written since. Returns the manifests of the last `keep`, oldest first; nothing where there are fewer: were one of
    them damaged, the run would begin anew.
    """
    since, last, kept = min(map(checkpoint.step_of, sound)), [], set[str]()
    for folder in checkpoint.folders(storage):
        if folder not in sound and checkpoint.step_of(folder) >= since:
            continue
        if len(last) < keep:
            try:
                last.append(checkpoint.read_manifest(storage, folder))
            except checkpoint.DAMAGE as damage:
                logger.warning("checkpoint %s/%s does not verify (%s); removing it", storage.uri, folder, damage)
                continue
        elif not (every and checkpoint.step_of(folder) % every == 0):
            continue
        kept.add(folder)
    _clear(storage, kept)
    return last[::-1] if len(last) == keep else []


def sweep(storage: Storage) -> None:
    """Removes what is not a checkpoint: the files of attempts that were killed, or had no room, before they ended."""
    _clear(storage, checkpoint.folders(storage))


def _clear(storage: Storage, kept: Collection[str]) -> None:
    """Removes all folders but those, and what killed writes have left."""
    killed = [leftover for leftover in storage.leftovers() if leftover.key.startswith("step_")]
    for leftover in killed:
        storage.discard(leftover)
    there = {entry.key.partition("/")[0] for entry in [*storage.list("step_"), *killed]}
    for folder in there - set(kept):
        remove(storage, folder)


def remove(storage: Storage, folder: str) -> None:
    """Deletes a checkpoint, the manifest first: what is left of it in between is not one."""
    storage.delete(f"{folder}/{checkpoint.MANIFEST}")
    for entry in list(storage.list(f"{folder}/")):
        storage.delete(entry.key)
    path = storage.local_path(folder)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)  # with what a killed write left in it
