"""`sae_dist.load`: a dictionary from wherever it lies."""

import re
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from sae_dist import formats, storage
from sae_dist.config import UserError
from sae_dist.config import load as load_config
from sae_dist.formats import Told
from sae_dist.sae import dictionary
from sae_dist.sae.module import DictionaryModule

FILES = ("config.json", "dictionary.safetensors")


def load(where: str | PathLike[str], *, format: str | None = None, **told: Any) -> DictionaryModule:
    """The dictionary in `where`: the folder of a finished run, a dictionary's own folder, or either at s3://.

    Of a run of several dictionaries that is the main one; the others have folders of their own,
    RUN/dictionaries/NAME. With `format`, it is another tool's file or folder (docs/formats.md), of which `told` says
    what the file does not: hook="resid_post.12", model=... UserError where there is none, or it is damaged.
    """
    place = str(where)
    if format is not None:
        return DictionaryModule(formats.read(Path(place).expanduser(), format=format, told=load_config(Told, told)))
    if told:
        raise UserError(f"{next(iter(told))} is for the files of another tool; say which with format=")
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
