"""Object storage: a folder, the memory of this process or S3 behind one handful of operations.

Objects are written whole or not at all, are never changed, and `create` succeeds for exactly one of many writers.
"""

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sae_dist import faults
from sae_dist.config import UserError

Bytes = bytes | bytearray | memoryview
TEMPORARY = ".partial-"  # files that a killed writer left; never listed


class StorageError(UserError):
    """The storage said no, or nothing at all for too long; one line with the cure."""


class Entry(NamedTuple):
    """A stored object; mtime in seconds since the epoch, by the clock of the storage."""

    key: str
    size: int
    mtime: float


def checked_key(key: str) -> str:
    """`key` if it is a plain relative path: no empty part, no '..', nothing that a shell or a URL would read."""
    parts = key.split("/")
    if not re.fullmatch(r"[A-Za-z0-9._/=+-]+", key) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"key={key!r} is not a plain relative path; names of hooks and units make the keys")
    return key


class LocalStorage:
    """A folder. Writes go to a temporary file, are flushed to disk and linked into place."""

    def __init__(self, root: Path):
        self.root = root
        self.uri = str(root)

    def local_path(self, key: str) -> Path | None:
        return self.root / checked_key(key)

    def read(self, key: str, start: int | None = None, length: int | None = None) -> Bytes:
        with (self.root / checked_key(key)).open("rb") as file:
            if start:
                file.seek(start)
            return file.read(-1 if length is None else length)

    def write(self, key: str, data: Bytes) -> None:
        """Puts the object there, in place of any other of that key."""
        self._place(key, data, replace=True)

    def create(self, key: str, data: Bytes) -> bool:
        """Puts the object there if none is; True for the one writer that did."""
        return self._place(key, data, replace=False)

    def _place(self, key: str, data: Bytes, *, replace: bool) -> bool:
        path = self.root / checked_key(key)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                faults.point("storage.before_sync", key=key)
                os.fsync(file.fileno())
            faults.point("storage.before_rename", key=key)
            if replace:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # fails if the name is taken, and shows the whole content or nothing
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageError(
                    f"{path}: {error.strerror} writing {len(data)} bytes; free space or move the store"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose key starts with `prefix`, by key."""
        return (e for e in self._walk(prefix) if not Path(e.key).name.startswith(TEMPORARY))

    def leftovers(self) -> Iterator[Entry]:
        """What killed writers left behind and nobody can read."""
        return (e for e in self._walk("") if Path(e.key).name.startswith(TEMPORARY))

    def _walk(self, prefix: str) -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        pending = [self.root / folder]
        found = []
        while pending:
            try:
                children = list(os.scandir(pending.pop()))
            except FileNotFoundError:
                continue
            for child in children:
                if child.is_dir(follow_symlinks=False):
                    pending.append(Path(child.path))
                    continue
                key = Path(child.path).relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    try:
                        status = child.stat()
                    except FileNotFoundError:
                        continue  # renamed or deleted since the folder was read
                    found.append(Entry(key, status.st_size, status.st_mtime))
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        """Removes the object; no error if there is none."""
        (self.root / checked_key(key)).unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return (self.root / checked_key(key)).is_file()

    def size(self, key: str) -> int:
        return (self.root / checked_key(key)).stat().st_size


class MemoryStorage:
    """Objects in the memory of this process, for tests; two handles of one name see the same objects."""

    _stores: dict[str, dict[str, tuple[bytes, float]]] = {}  # shared on purpose: it stands for a server

    def __init__(self, name: str):
        self.uri = f"memory://{name}"
        self._objects = self._stores.setdefault(name, {})

    def local_path(self, key: str) -> Path | None:
        checked_key(key)
        return None

    def read(self, key: str, start: int | None = None, length: int | None = None) -> Bytes:
        if key not in self._objects:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{key}")
        data = self._objects[key][0]
        first = start or 0
        return data[first : len(data) if length is None else first + length]

    def write(self, key: str, data: Bytes) -> None:
        self._objects[checked_key(key)] = (bytes(data), time.time())

    def create(self, key: str, data: Bytes) -> bool:
        value = (bytes(data), time.time())
        return self._objects.setdefault(checked_key(key), value) is value  # one step under the interpreter's lock

    def list(self, prefix: str = "") -> Iterator[Entry]:
        entries = sorted(self._objects.items())
        return (Entry(key, len(data), mtime) for key, (data, mtime) in entries if key.startswith(prefix))

    def leftovers(self) -> Iterator[Entry]:
        return iter(())

    def delete(self, key: str) -> None:
        self._objects.pop(checked_key(key), None)

    def exists(self, key: str) -> bool:
        return key in self._objects

    def size(self, key: str) -> int:
        return len(self.read(key))


Storage = LocalStorage | MemoryStorage


def open(uri: str | Path) -> Storage:
    """The storage at `uri`: a folder, file:///folder, memory://name or s3://bucket/prefix."""
    scheme, separator, rest = str(uri).partition("://")
    if not separator:
        return LocalStorage(Path(uri).absolute())
    match scheme:
        case "file":
            return LocalStorage(Path(rest).absolute())
        case "memory":
            return MemoryStorage(rest)
        case _:
            raise UserError(f"store={uri}: unknown scheme {scheme}; use a folder, file://, s3:// or memory://")


def probe(storage: Storage) -> None:
    """Refuses a storage on which two writers could both believe that they were first.

    Some S3 servers ignore If-None-Match and answer 200 to everybody (rclone 1.75, nanio 0.1 do).
    """
    key = f"probe/{uuid.uuid4().hex}"
    try:
        first, second = storage.create(key, b"first"), storage.create(key, b"second")
        kept = bytes(storage.read(key))
    finally:
        storage.delete(key)
    if not first or second or kept != b"first":
        raise StorageError(
            f"store={storage.uri}: a second conditional create of one key was accepted, so two producers could "
            "commit one unit; use a store that honours If-None-Match (AWS S3, R2, MinIO, SeaweedFS, a local folder)"
        )
