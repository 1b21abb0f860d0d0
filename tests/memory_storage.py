"""A storage in the memory of this process, by the same protocol as folders and S3."""

import errno
import time
from collections.abc import Iterator
from pathlib import Path

from sae_dist.storage.interface import Bytes, Entry, checked_key


class MemoryStorage:
    """Objects by name; two handles of one name see the same objects."""

    _stores: dict[str, dict[str, tuple[bytes, float]]] = {}  # shared on purpose: it stands for a server

    def __init__(self, name: str):
        self.uri = f"memory://{name}"
        self._objects = self._stores.setdefault(name, {})
        self.requests = 0

    def local_path(self, key: str) -> Path | None:
        checked_key(key)
        return None

    def read(self, key: str, start: int | None = None, length: int | None = None) -> Bytes:
        self.requests += 1
        if key not in self._objects:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.uri}/{key}")
        data = self._objects[key][0]
        first = start or 0
        return data[first : len(data) if length is None else first + length]

    def write(self, key: str, data: Bytes) -> None:
        self.requests += 1
        self._objects[checked_key(key)] = (bytes(data), time.time())

    def create(self, key: str, data: Bytes) -> bool:
        self.requests += 1
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

    def discard(self, leftover: Entry) -> None:
        self.delete(leftover.key)
