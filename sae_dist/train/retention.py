"""Which checkpoints are kept: the newest, the last ones that each dictionary may roll back to, and milestones.

Only what this run wrote is ever removed: folders with its id, and in them files with the names of its files. Folders
that somebody copied or renamed, files that somebody put there and targets of links are left alone.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from sae_dist.shards import records
from sae_dist.storage import Entry, Storage
from sae_dist.train.checkpoint import DAMAGE
from sae_dist.train.checkpoint_folders import MANIFEST, MANIFEST_BYTES, OWN_FILE, folders, is_of, step_of
from sae_dist.train.checkpoint_manifest import CheckpointManifest, read_manifest

logger = logging.getLogger(__name__)


class Retention(NamedTuple):
    """Which checkpoints are kept besides the newest one."""

    keep: int  # so many of the last ones that fit, for each of `fits`
    every: int  # and those whose step is a multiple of it; 0: none
    # for each dictionary: whether it may roll back to a checkpoint
    fits: Sequence[Callable[[CheckpointManifest], bool]] = (lambda _: True,)


def prune(storage: Storage, run_id: str, retention: Retention, *, sound: Collection[str]) -> list[CheckpointManifest]:
    """Removes this run's checkpoints that `retention` does not keep, and the remains of killed saves.

    `sound`: the folder that the run resumed from, and those that it wrote since. Older checkpoints count if their
    manifest verifies. Other folders of later steps failed to verify when the run resumed, and are removed, since they
    would be newer than what was written since. Returns the manifests that the run may resume from or roll back to,
    oldest first; none while some dictionary has fewer than `keep`, since it might have to restart from step 0.
    """
    since, last, kept = min(map(step_of, sound)), list[CheckpointManifest](), set[str]()
    counts = [0] * len(retention.fits)
    for folder in folders(storage, run_id):
        if folder not in sound and step_of(folder) >= since:
            continue
        if not last or min(counts) < retention.keep:
            try:
                manifest = read_manifest(storage, folder)
            except DAMAGE as damage:
                logger.warning("checkpoint %s/%s does not verify (%s)", storage.uri, folder, damage)
                continue
            wanted = [fits(manifest) and n < retention.keep for fits, n in zip(retention.fits, counts, strict=True)]
            counts = [n + more for n, more in zip(counts, wanted, strict=True)]
            if not last or any(wanted):
                last.append(manifest)
                kept.add(folder)
        if retention.every and step_of(folder) % retention.every == 0:
            kept.add(folder)
    _clear(storage, run_id, kept)
    return last[::-1] if min(counts) == retention.keep else []


def sweep(storage: Storage, run_id: str) -> None:
    """Removes the remains of the run's killed or failed saves."""
    _clear(storage, run_id, folders(storage, run_id))


def remove(storage: Storage, folder: str) -> None:
    """Deletes a checkpoint's own files, the manifest first, so that a partly deleted folder is not a checkpoint."""
    storage.delete(f"{folder}/{MANIFEST}")
    for entry in [entry for entry in storage.list(f"{folder}/") if _is_own(entry)]:
        storage.delete(entry.key)
    path = storage.local_path(folder)
    if path is not None:
        with contextlib.suppress(OSError):  # somebody put another file there
            path.rmdir()


def _clear(storage: Storage, run_id: str, kept: Collection[str]) -> None:
    """Removes all checkpoints of the run except `kept`, and the remains of killed saves."""
    killed = [leftover for leftover in storage.leftovers() if is_of(_folder(leftover), run_id)]
    for leftover in killed:
        storage.discard(leftover)
    there = {_folder(entry) for entry in storage.list("step_") if _is_own(entry)} | {_folder(entry) for entry in killed}
    for folder in sorted(there - set(kept)):
        if is_of(folder, run_id) and not _was_renamed(storage, folder):
            remove(storage, folder)


def _folder(entry: Entry) -> str:
    return entry.key.partition("/")[0]


def _is_own(entry: Entry) -> bool:
    return OWN_FILE.fullmatch(entry.key.partition("/")[2]) is not None


def _was_renamed(storage: Storage, folder: str) -> bool:
    """Whether a checkpoint was copied or renamed to this folder by somebody."""
    try:
        return records.read(storage, f"{folder}/{MANIFEST}", folder, most=MANIFEST_BYTES).get("folder") != folder
    except DAMAGE:
        return False
