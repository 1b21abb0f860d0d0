"""Checksums of the files of a folder, in the folder: what lies there is what was written, or it is said."""

import json
from pathlib import Path

import xxhash

from sae_dist.config import digest

NAME = "checksums.json"
BLOCK = 1 << 24


def write(folder: Path) -> None:
    """Writes `NAME`: the xxh3-128 of every other file below `folder`."""
    (folder / NAME).write_text(json.dumps(_measure(folder), indent=1))


def damage(folder: Path) -> str:
    """What is not as it was written, in words; empty when all is."""
    try:
        known = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return f"{NAME} cannot be read"
    found = _measure(folder)
    if known == found:
        return ""
    names = [name for name in sorted({*known, *found}) if known.get(name) != found.get(name)]
    return f"{', '.join(names)}: not what was written"


def of_arrays(folder: Path) -> str:
    """One digest of all .npy files, as `write` recorded them."""
    known = json.loads((folder / NAME).read_text())
    return digest({name: checksum for name, checksum in known.items() if name.endswith(".npy")})[:32]


def _measure(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {path.relative_to(folder).as_posix(): _hash(path) for path in files}


def _hash(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()
