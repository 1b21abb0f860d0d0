"""One process at a time works in a place, on however many machines it was started: a lease lies in the place itself.

<folder>/<token>.json is created once and names the holder; the highest token counts (a fencing token: it only grows).
The holder writes <folder>/<token>.beat again and again. A newcomer takes the next token when the last holder said that
it is done, when its process is seen to be dead, or when the beat did not change for `TTL_S` seconds of the newcomer's
own clock; clocks of two machines are never compared. A holder that slept through that finds the higher token and stops.
The safety of a store does not rest on this: units are committed once whoever writes them. It saves doing them twice.
"""

import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sae_dist.config import UserError
from sae_dist.shards import records
from sae_dist.storage import Storage

logger = logging.getLogger(__name__)

TTL_S = 30.0
BEATS = 6  # in TTL_S: one that comes late does not end a lease


class Place(NamedTuple):
    """What is leased."""

    storage: Storage
    key: str  # of the configuration, that a message names it by
    folder: str  # of the lease's own files, within the storage

    @property
    def name(self) -> str:
        return f"{self.key}={self.storage.uri}"

    def newest(self) -> int:
        """The highest token, 0 when there is none."""
        found = (
            re.fullmatch(rf"{self.folder}/(\d{{6,}})\.json", entry.key)
            for entry in self.storage.list(f"{self.folder}/")
        )
        return max((int(match[1]) for match in found if match), default=0)

    def take(self, token: int, holder: dict[str, Any]) -> None:
        self.storage.create(f"{self.folder}/{token:06d}.json", records.seal(holder))

    def holder(self, token: int) -> dict[str, Any]:
        """Who holds or held it, as far as that can be read: a damaged file names nobody, and its beat decides."""
        return self._read(f"{self.folder}/{token:06d}.json") or {
            "pid": "unknown",
            "host": "an unknown host",
            "out": "?",
        }

    def beat(self, token: int, content: dict[str, Any]) -> None:
        self.storage.write(f"{self.folder}/{token:06d}.beat", records.seal(content))

    def last_beat(self, token: int) -> dict[str, Any]:
        return self._read(f"{self.folder}/{token:06d}.beat")

    def _read(self, key: str) -> dict[str, Any]:
        try:
            return records.read(self.storage, key, f"{self.storage.uri}/{key}")
        except (FileNotFoundError, records.CorruptData):
            return {}


class Lease:
    """The right to work in a place; `check` says when somebody else has taken it."""

    def __init__(self, place: Place, token: int, ttl_s: float) -> None:
        self.token, self._place, self._ttl_s = token, place, ttl_s
        self._lost_to: str | None = None
        self._beats, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._beat()
        self._thread.start()

    def check(self) -> None:
        """UserError once another process holds the place."""
        if self._lost_to is not None:
            raise UserError(
                f"{self._place.name} was taken over by {self._lost_to} while this process gave no sign of life for "
                f"{self._ttl_s:.0f} s; nothing is lost, that one goes on"
            )

    def release(self) -> None:
        """Another process may begin at once."""
        self._end.set()
        self._thread.join()
        if self._lost_to is None:
            try:
                self._beat(released=True)
            except (UserError, OSError) as error:
                logger.warning("%s: the lease could not be ended (%s); it ends by itself", self._place.name, error)

    def _beat(self, *, released: bool = False) -> None:
        self._beats += 1
        self._place.beat(self.token, {"beat": self._beats, "released": released})

    def _keep(self) -> None:
        while not self._end.wait(self._ttl_s / BEATS):
            try:
                newest = self._place.newest()
                if newest > self.token:
                    self._lost_to = _described(self._place.holder(newest))
                    return
                self._beat()
            except (UserError, OSError) as error:
                logger.warning("%s: the lease could not be renewed (%s); trying again", self._place.name, error)


@contextmanager
def lease(storage: Storage, out: str, *, key: str, folder: str, ttl_s: float = TTL_S) -> Iterator[Lease]:
    """Holds the place for as long as the context lasts; UserError while another process does.

    `out` is what the holder is known by, `key` the key of the configuration that names the place, and `folder` where
    the lease's own files lie in it.
    """
    place = Place(storage, key, folder)
    held = Lease(place, _acquire(place, out, ttl_s), ttl_s)
    try:
        yield held
    finally:
        held.release()


def _acquire(place: Place, out: str, ttl_s: float) -> int:
    while True:
        newest = place.newest()
        if newest and not _is_over(place, newest, ttl_s):
            raise UserError(
                f"{place.name} is in use by {_described(place.holder(newest))}; wait for it, stop it, or choose "
                f"another {place.key}="
            )
        name = uuid.uuid4().hex
        place.take(newest + 1, {"name": name, "out": out, **_identity(os.getpid())})
        if place.holder(newest + 1).get("name") == name:  # read back: the answer to `create` may have been lost
            return newest + 1


def _is_over(place: Place, token: int, ttl_s: float) -> bool:
    """Whether the holder of `token` is done or dead; takes up to `ttl_s` to say so of one on another machine."""
    holder, here = place.holder(token), _identity(os.getpid())
    before = place.last_beat(token)
    if before.get("released"):
        return True
    if "machine" in here and holder.get("machine") == here["machine"]:
        return holder != holder | _identity(holder["pid"])  # gone, or another process by that number
    logger.info("%s belongs to %s; waiting %.0f s for a sign of life", place.name, _described(holder), ttl_s)
    until = time.monotonic() + ttl_s
    while time.monotonic() < until:
        time.sleep(min(ttl_s / BEATS, max(until - time.monotonic(), 0)))
        now = place.last_beat(token)
        if now.get("released"):
            return True
        if now != before:
            return False
    return True


def _identity(pid: int) -> dict[str, Any]:
    """Who a process is, beyond its number; `machine` only where it can be told (Linux): boot and process namespace."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "born": None}
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["machine"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found["born"] = None if fields[0] == "Z" else fields[19]  # ticks since boot; a zombie is dead
    except OSError:  # no such process, or no /proc
        pass
    return found


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} (out={holder['out']})"
