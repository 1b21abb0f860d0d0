"""Checksums of the files of a folder, kept in the folder: damaged and missing files are found before they are used."""

import json
from pathlib import Path

import xxhash

from sae_dist.config import digest

NAME = "checksums.json"
BLOCK = 1 << 24


def write(folder: Path) -> None:
    """Writes `NAME`: the xxh3-128 of every other file below `folder`."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    found = {path.relative_to(folder).as_posix(): _hash(path) for path in sorted(files)}
    (folder / NAME).write_text(json.dumps(found, indent=1))


def damage(folder: Path) -> str:
    """Which files `write` recorded and are not what they were, in words; empty when all are. Others may be there."""
    try:
        known = dict(json.loads((folder / NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{NAME} cannot be read"
    wrong = [name for name, checksum in sorted(known.items()) if not _is_sound(folder / name, checksum)]
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return f"{shown}: not what was written" if wrong else ""


def combined(folder: Path, suffix: str) -> str:
    """One digest of all files whose names end in `suffix`, as `write` recorded them."""
    known = json.loads((folder / NAME).read_text())
    return digest({name: checksum for name, checksum in known.items() if name.endswith(suffix)})[:32]


def _is_sound(path: Path, checksum: object) -> bool:
    return path.is_file() and _hash(path) == checksum


def _hash(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()
