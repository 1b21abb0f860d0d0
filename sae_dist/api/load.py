"""`sae_dist.load`: a dictionary from wherever it lies."""

import re
import tempfile
from os import PathLike
from pathlib import Path

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.sae import dictionary
from sae_dist.sae.module import DictionaryModule

FILES = ("config.json", "dictionary.safetensors")


def load(where: str | PathLike[str]) -> DictionaryModule:
    """The dictionary in `where`: the folder of a finished run, a dictionary's own folder, or either at s3://.

    Of a run of several dictionaries that is the main one; the others have folders of their own,
    RUN/dictionaries/NAME. UserError where there is none, or it is damaged.
    """
    place = str(where)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place):
        with tempfile.TemporaryDirectory(prefix="sae_dist_") as copy:
            _fetch(place, Path(copy))
            return DictionaryModule(dictionary.load(Path(copy)))
    folder = Path(place).expanduser()
    inner = folder / "dictionary"
    return DictionaryModule(dictionary.load(inner if inner.is_dir() else folder))


def _fetch(uri: str, folder: Path) -> None:
    """Copies the two files of a dictionary, of a run or its own, at `uri`."""
    there = storage.open(uri)
    prefix = "dictionary/" if there.exists(f"dictionary/{FILES[0]}") else ""
    for name in FILES:
        try:
            (folder / name).write_bytes(there.read(prefix + name))
        except FileNotFoundError:
            raise UserError(f"{uri} has no {name}; give a run's folder or its dictionary/") from None
