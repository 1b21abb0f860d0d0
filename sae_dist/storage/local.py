"""A folder as storage, on a local or a shared file system."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from sae_dist import faults
from sae_dist.storage.interface import Bytes, Entry, ReadOnlyError, StorageError, checked_key

NO_LINKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)  # what a file system answers that has no hard links
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
TEMPORARY = ".partial-"  # prefix of files that are being written, or that a killed writer left; never listed


class LocalStorage:
    """A folder. Writes go to a temporary file, are flushed to disk and linked into place."""

    def __init__(self, root: Path):
        self.root = root
        self.uri = str(root)
        self.requests = 0

    def local_path(self, key: str) -> Path | None:
        return self.root / checked_key(key)

    def read(self, key: str, start: int | None = None, length: int | None = None) -> Bytes:
        self.requests += 1
        with open(self.root / checked_key(key), "rb", opener=_open_file) as file:
            if start:
                file.seek(start)
            return file.read(-1 if length is None else length)

    def write(self, key: str, data: Bytes) -> None:
        self._place(key, data, replace=True)

    def create(self, key: str, data: Bytes) -> bool:
        return self._place(key, data, replace=False)

    def _place(self, key: str, data: Bytes, *, replace: bool) -> bool:
        self.requests += 1
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
            elif not self._link(temporary, path):
                return False
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno in REFUSED:
                kind = ReadOnlyError if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else StorageError
                raise kind(
                    f"store={self.uri}: {error.strerror} at {error.filename}; choose a folder that this user may write"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageError(
                    f"{path}: {error.strerror} writing {len(data)} bytes; free space or move the store"
                ) from error
            raise
        finally:
            _remove(temporary)
        return True

    def _link(self, temporary: Path, path: Path) -> bool:
        """Shows the whole content under its name, or nothing: False if the name is taken."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise StorageError(
                f"{self.uri}: this file system has no hard links, so nothing can be created exactly once there; use "
                "s3:// for store= and train.checkpoints="
            ) from error
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return (e for e in self._walk(prefix) if not Path(e.key).name.startswith(TEMPORARY))

    def leftovers(self) -> Iterator[Entry]:
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
                key = Path(child.path).relative_to(self.root).as_posix()
                if not key.startswith(prefix):
                    continue
                if child.is_dir(follow_symlinks=False):
                    pending.append(Path(child.path))
                    continue
                try:
                    status = child.stat()
                except FileNotFoundError:
                    continue  # renamed or deleted since the folder was read
                if stat.S_ISREG(status.st_mode):  # a link to a folder is not an object
                    found.append(Entry(key, status.st_size, status.st_mtime))
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        self._remove(checked_key(key))

    def exists(self, key: str) -> bool:
        return (self.root / checked_key(key)).is_file()

    def size(self, key: str) -> int:
        return (self.root / checked_key(key)).stat().st_size

    def discard(self, leftover: Entry) -> None:
        self._remove(leftover.key)

    def _remove(self, key: str) -> None:
        path = self.root / key
        for folder in path.parents[: len(Path(key).parts) - 1]:
            if folder.is_symlink():
                raise StorageError(
                    f"{path} is not removed: {folder} is a link, and what it leads to is outside this place"
                )
        _remove(path)


def _open_file(path: str, flags: int) -> int:
    """Opens a regular file; StorageError for a pipe, on which a read would block, a device or a folder."""
    file = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise StorageError(f"{path} is not a file (a pipe, a device or a folder); remove it, or choose another store")
    return file


def _remove(path: Path) -> None:
    """Unlinks the file if it exists; a path below a regular file does not."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()
