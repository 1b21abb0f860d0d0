"""Where a dictionary lies: in the folder of a run, in its own, in either on object storage, or on the Hub."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.hub import address
from sae_dist.hub.pull import pull
from sae_dist.sae import dictionary
from sae_dist.sae.dictionary import Dictionary
from sae_dist.storage import Storage

FILES = ("config.json", "dictionary.safetensors")
PIECE = 64 << 20  # bytes that are copied at once


def is_uri(where: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def is_there(where: str) -> bool:
    """Whether a dictionary lies at `where`, sound or not."""
    if address.is_address(where):
        return bool(_pulled(where))
    if is_uri(where):
        there = storage.open(where)
        return there.exists(_prefix(there) + FILES[0])
    return (_own_folder(where) / FILES[0]).is_file()


def load(where: str, part: Callable[[int], range] | None = None) -> Dictionary:
    """The dictionary at `where`, or its latents `part(n_latents)`; UserError where there is none, or it is damaged."""
    with dictionary_folder(where) as folder:
        return dictionary.load(folder, part)


@contextmanager
def dictionary_folder(where: str) -> Iterator[Path]:
    """The folder with the two files of the dictionary at `where`: a run's folder, its own, either at s3://, or hf://.

    Of a run of several dictionaries that is the main one. What lies on object storage is copied to a temporary folder
    for as long as this is open. UserError where a file is missing there.
    """
    if address.is_address(where):
        yield _pulled(where)
        return
    if not is_uri(where):
        yield _own_folder(where)
        return
    there = storage.open(where)
    prefix = _prefix(there)
    with tempfile.TemporaryDirectory(prefix="sae_dist_") as copy:
        for name in FILES:
            if not there.exists(prefix + name):
                raise UserError(f"{where} has no {name}; give a run's folder or its dictionary/")
            _copy(there, prefix + name, Path(copy) / name)
        yield Path(copy)


def _pulled(where: str) -> Path:
    return pull(address.parse("dictionary", where), FILES).path


def _own_folder(where: str) -> Path:
    folder = Path(where).expanduser()
    inner = folder / "dictionary"
    return inner if inner.is_dir() else folder


def _prefix(there: Storage) -> str:
    return "dictionary/" if there.exists(f"dictionary/{FILES[0]}") else ""


def _copy(there: Storage, key: str, path: Path) -> None:
    size = there.size(key)
    with path.open("wb") as file:
        for start in range(0, size, PIECE):
            file.write(there.read(key, start, min(PIECE, size - start)))
