"""A folder of runs and sweeps that others may look at: what is in it, and which files of it they may read.

Only files in `pages/` of a run and in `report/` of a sweep may be read, and answers from feature data
(shown_features.py). Configurations, checkpoints, dictionaries and text may not, and no link is followed, wherever it
leads.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.storage import Bytes, LocalStorage, Storage, checked_key
from sae_dist.sweep.folder import SWEEP

DEPTH = 4  # folders below the one that is shown in which runs and sweeps are looked for
RUN_FILES = ("status.json", "metrics.jsonl")  # every run has one of them
Marks = Mapping[str, tuple[str, ...]]  # folders that are shown: what must lie beside them
MARKS: Marks = {"pages": RUN_FILES, "labels": RUN_FILES, "report": (SWEEP,)}
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG, errno.ENXIO)
STORE = "store.json"


class Found(NamedTuple):
    """Folders relative to the one that is shown, by name; "" is that folder itself."""

    runs: list[str]
    sweeps: list[str]


class ShownFile(NamedTuple):
    """An open file; `tag` is another one once the content has changed."""

    size: int
    tag: str
    read: Callable[[int, int], Bytes]  # start, length


class ShownFolder(Protocol):
    """A folder on a disk or on object storage."""

    uri: str

    def found(self) -> Found:
        """The runs and sweeps in it. Folders of a run or sweep are not searched for others."""
        ...

    def open(self, parts: Sequence[str], marks: Marks = MARKS) -> contextlib.AbstractContextManager[ShownFile | None]:
        """The file at this path; None where there is none in a folder of `marks`, which are what others may read."""
        ...


def shown_folder(where: str, *, retry_s: float) -> ShownFolder:
    """UserError where there is no such folder."""
    place = storage.open(where, retry_s=retry_s)
    if not isinstance(place, LocalStorage):
        return _Prefix(place)
    if not place.root.is_dir():
        raise UserError(f"out={where} is no folder; give that of a run, of a sweep or of several")
    return _LocalFolder(place.root.resolve())


class _LocalFolder:
    """On a disk."""

    def __init__(self, root: Path) -> None:
        self.uri, self._root = str(root), root

    def found(self) -> Found:
        runs, sweeps = [], []
        for path, folders, files in os.walk(self._root):
            relative = os.path.relpath(path, self._root)
            name = "" if relative == "." else relative
            if SWEEP in files:
                sweeps.append(name)
            elif any(mark in files for mark in RUN_FILES):
                runs.append(name)
            elif STORE not in files and (not name or name.count("/") + 1 < DEPTH):
                folders[:] = [each for each in folders if not each.startswith(".")]
                continue
            folders.clear()
        return Found(sorted(runs), sorted(sweeps))

    @contextmanager
    def open(self, parts: Sequence[str], marks: Marks = MARKS) -> Iterator[ShownFile | None]:
        beside = [self._root.joinpath(*parts[:at], mark) for at, own in _marks(parts, marks) for mark in own]
        # unlike Path.is_file, this is False for a name that is too long and in a folder that may not be entered
        if not any(map(os.path.isfile, beside)):
            yield None
            return
        file = _opened(self._root, parts)
        if file is None:
            yield None
            return
        try:
            about = os.fstat(file)
            tag = f"{about.st_ino:x}-{about.st_size:x}-{about.st_mtime_ns:x}"
            yield ShownFile(about.st_size, tag, lambda start, length: os.pread(file, length, start))
        finally:
            os.close(file)


def _opened(root: Path, parts: Sequence[str]) -> int | None:
    """The descriptor of a regular file; each folder on the way is opened in the one before, and none may be a link."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = deeper
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    finally:
        os.close(folder)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    return None


class _Prefix:
    """On object storage."""

    def __init__(self, place: Storage) -> None:
        self.uri, self._place = place.uri, place

    def found(self) -> Found:
        runs, sweeps = set[str](), set[str]()
        for entry in self._place.list(""):
            folder, _, name = entry.key.rpartition("/")
            if name in (*RUN_FILES, SWEEP) and folder.count("/") < DEPTH:
                (sweeps if name == SWEEP else runs).add(folder)
        both = runs | sweeps
        outer = {each for each in both if not any(_is_in(each, other) for other in both if other != each)}
        return Found(sorted(runs & outer - sweeps), sorted(sweeps & outer))

    @contextmanager
    def open(self, parts: Sequence[str], marks: Marks = MARKS) -> Iterator[ShownFile | None]:
        try:
            key = checked_key("/".join(parts))
            beside = ["/".join([*parts[:at], mark]) for at, own in _marks(parts, marks) for mark in own]
            shown = any(self._place.exists(mark) for mark in beside)
        except UserError:  # no name that an object may have here
            shown, key = False, ""
        entry = next(iter(self._place.list(key)), None) if shown else None
        if entry is None or entry.key != key:
            yield None
            return
        yield ShownFile(
            entry.size, f"{entry.size:x}-{entry.mtime:.3f}", lambda start, length: self._place.read(key, start, length)
        )


def _is_in(folder: str, other: str) -> bool:
    return not other or folder.startswith(f"{other}/")


def _marks(parts: Sequence[str], marks: Marks) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Where in a path a folder that is shown may begin, and what must lie beside it; nothing for a path with `..`."""
    if all(part and not part.startswith(".") and "/" not in part and "\0" not in part for part in parts):
        yield from ((at, marks[part]) for at, part in enumerate(parts[:-1]) if part in marks)
