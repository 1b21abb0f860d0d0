"""A local cache for slices of a remote store: each is fetched once per machine, however often it is read.

Files are named by the hash of their content, so jobs on one machine may share the folder. The reader verifies every
slice, cached or not. A file that is evicted while it is mapped stays readable until it is unmapped.
"""

import errno
import logging
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sae_dist import faults
from sae_dist.locks import file_lock
from sae_dist.shards.commits import SliceRef
from sae_dist.shards.memory_map import map_bytes

logger = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKS = 64
ABANDONED_S = 3600.0  # the age at which a temporary file was surely left by a dead process
SLICE_NAME, TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}\.slice"), re.compile(r"\.[0-9a-f]{32}")
RESCAN = 32  # writes between two scans for files of other jobs


class SliceCache:
    """A folder of slices of at most `limit_bytes`; the least recently used are evicted first."""

    def __init__(self, folder: Path, *, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter(hits=0, misses=0, evicted=0, dropped=0, uncached=0)
        self._used, self._writes = self._measure(), 0
        self._lock = threading.Lock()

    def get(self, ref: SliceRef, fetch: Callable[[], UInt8[np.ndarray, " bytes"]]) -> UInt8[np.ndarray, " bytes"]:
        """The bytes of a slice; when several readers on this machine miss it at once, one of them fetches it."""
        path = self._path(ref)
        found = self._look(path, ref)
        if found is not None:
            return found
        with self._locked(ref):
            found = self._look(path, ref)
            if found is not None:
                return found
            self._count("misses")
            data = fetch()
            if not self._keep(path, data):
                return data
        kept = self._look(path, ref, count=False)
        return data if kept is None else kept  # mapped memory, which the kernel can reclaim

    def drop(self, ref: SliceRef) -> None:
        """Removes a slice whose bytes are wrong."""
        self._path(ref).unlink(missing_ok=True)
        self._count("dropped")

    def _path(self, ref: SliceRef) -> Path:
        return self.folder / ref.xxh3_128[:2] / f"{ref.xxh3_128}.slice"

    def _look(self, path: Path, ref: SliceRef, *, count: bool = True) -> UInt8[np.ndarray, " bytes"] | None:
        try:
            data = map_bytes(path, 0, ref.bytes)
            os.utime(path)
        except FileNotFoundError:
            return None
        if count:
            self._count("hits")
        return data

    def _keep(self, path: Path, data: UInt8[np.ndarray, " bytes"]) -> bool:
        """Writes the bytes to the cache if there is room; a full disk makes runs slower but does not end them."""
        if len(data) > self.limit_bytes:
            return False
        problem = ""
        for attempt in range(2):
            self._make_room(len(data), everything=attempt == 1)
            temporary = path.with_name(f".{uuid.uuid4().hex}")
            try:
                path.parent.mkdir(exist_ok=True)
                with temporary.open("wb") as file:
                    file.write(data.data)
                faults.point("cache.before_rename", slice=path.stem)
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                problem = error.strerror or ""
            else:
                with self._lock:
                    self._used += len(data)
                return True
            finally:
                temporary.unlink(missing_ok=True)
        if self.counts["uncached"] == 0:
            logger.warning(
                "cache %s: %s even when empty; slices are read from the store each time", self.folder, problem
            )
        self._count("uncached")
        return False

    def _make_room(self, needed: int, *, everything: bool) -> None:
        with self._lock:
            self._writes += 1
            if self._writes % RESCAN == 0:
                self._used = self._measure()
            if not everything and self._used + needed <= self.limit_bytes:
                return
            target = 0 if everything else 0.9 * self.limit_bytes - needed  # some slack, so that few writes scan
            entries = sorted(self._files(), key=lambda entry: entry[1].st_mtime)
            self._used = sum(status.st_size for _, status in entries)
            for path, status in entries:
                if self._used <= target:
                    break
                path.unlink(missing_ok=True)
                self._used -= status.st_size
                self.counts["evicted"] += 1

    def _measure(self) -> int:
        return sum(status.st_size for _, status in self._files())

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("??/*"):
            if not (SLICE_NAME.fullmatch(path.name) or TEMPORARY_NAME.fullmatch(path.name)):
                continue  # not the cache's
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another job was faster
            if SLICE_NAME.fullmatch(path.name) or time.time() - status.st_mtime > ABANDONED_S:
                yield path, status

    def _locked(self, ref: SliceRef) -> AbstractContextManager[None]:
        """A lock between threads and processes that want the same slice."""
        return file_lock(self.folder / "locks" / str(int(ref.xxh3_128[:8], 16) % LOCKS))

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1
