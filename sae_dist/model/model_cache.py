"""Model folders that are made on this machine once and then kept in the cache folder."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from sae_dist.cache_folder import CURE, cache_folder
from sae_dist.config import UserError
from sae_dist.locks import file_lock

logger = logging.getLogger(__name__)


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """The folder models/`name` of the cache, filled by `make` on first use; UserError when it cannot be written.

    If several processes call this at once, one makes the folder and the others wait. It is complete or absent.
    """
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{name}.lock")
        with file_lock(lock, waiting="waiting for another process that makes the same model"):
            if folder.is_dir():  # another process made it while this one waited
                return folder
            partial = folder.with_name(f".{name}.partial")
            if partial.is_dir():  # left by a killed process: a living one would hold the lock
                shutil.rmtree(partial)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    except OSError as error:
        raise UserError(f"the model cannot be kept in {folder.parent} ({error.strerror or error}); {CURE}") from error
    return folder
