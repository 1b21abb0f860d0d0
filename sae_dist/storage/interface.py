"""The interface of every storage: keys and whole objects."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from sae_dist.config import UserError

Bytes = bytes | bytearray | memoryview


class StorageError(UserError):
    """The storage refused a request or did not answer it in time; one line with the cure."""


class Unavailable(StorageError):
    """The storage did not answer in time. The input may be right, and the same command resumes: exit code 75."""


class ReadOnlyError(StorageError):
    """The storage may be read but not written."""


class Entry(NamedTuple):
    """A stored object; mtime in seconds since the epoch, by the clock of the storage."""

    key: str
    size: int
    mtime: float


class Storage(Protocol):
    """Objects under one URI, written whole; safe to use from several threads and processes."""

    uri: str

    @property
    def requests(self) -> int:
        """Reads and writes that were begun, repeated ones too; it grows while a storage refuses for the moment."""
        ...

    def read(self, key: str, start: int | None = None, length: int | None = None) -> Bytes:
        """The object, or `length` bytes of it from `start`; FileNotFoundError if there is none."""
        ...

    def write(self, key: str, data: Bytes) -> None:
        """Writes or replaces the object; readers see the old or the new one, never a part."""
        ...

    def create(self, key: str, data: Bytes) -> bool:
        """Writes the object if the key is free; True for exactly one of any number of writers.

        Writers of equal bytes may all get True, so every writer includes a unique name.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose key starts with `prefix`, by key."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; no error if there is none."""
        ...

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int: ...

    def local_path(self, key: str) -> Path | None:
        """Where a reader may map the object into memory; None if it is not a local file."""
        ...

    def leftovers(self) -> Iterator[Entry]:
        """Files or uploads that killed writers left: invisible to readers, but they take space."""
        ...

    def discard(self, leftover: Entry) -> None:
        """Removes one of the leftovers."""
        ...


def checked_key(key: str) -> str:
    """`key` if it is a plain relative path: no empty part, no '..', no special characters; else UserError."""
    parts = key.split("/")
    if not re.fullmatch(r"[A-Za-z0-9._/=+-]+", key) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"key={key!r} is not a plain relative path; names of hooks and units make the keys")
    return key
