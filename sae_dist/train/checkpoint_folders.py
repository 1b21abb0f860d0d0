"""Names of checkpoint folders: step_00000500-1f2e3d4c-8be0f1 is a step, the id of a run and the name of an attempt.

Folders with other names are neither read nor removed. A folder with another id belongs to another run.
"""

import re
import secrets

from sae_dist.storage import Storage

MANIFEST = "checkpoint.json"
MANIFEST_BYTES = 64 << 20  # a larger file is not read
OWN_FILE = re.compile(r"checkpoint\.json|rank\d{5}-\d{5,}\.safetensors")  # what a run writes into a checkpoint
_NAME = re.compile(r"step_(\d{8,})-(?:([0-9a-f]{8})-)?[0-9a-f]{6}")  # before format 5 without a mark


def new_folder(step: int, run_id: str) -> str:
    """A new folder name for one attempt to save."""
    return f"step_{step:08d}-{run_id}-{secrets.token_hex(3)}"


def step_of(folder: str) -> int:
    match = _NAME.fullmatch(folder)
    assert match is not None, folder
    return int(match[1])


def is_of(folder: str, run_id: str) -> bool:
    """Whether this is the folder name of a checkpoint of the run with this id."""
    match = _NAME.fullmatch(folder)
    return match is not None and match[2] == run_id


def folders(storage: Storage, run_id: str | None = None) -> list[str]:
    """The folders of complete checkpoints, newest first: those of one run, or of all."""
    found = [entry.key.removesuffix(f"/{MANIFEST}") for entry in storage.list("step_")]
    found = [folder for folder in found if _NAME.fullmatch(folder) and (run_id is None or is_of(folder, run_id))]
    return sorted(found, key=lambda folder: (step_of(folder), folder), reverse=True)
