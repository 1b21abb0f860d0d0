"""One driver at a time fills a store, on however many machines it was started: a lease that lies in the store itself.

producers/<token>.json is created once and names the holder; the highest token counts (a fencing token: it only grows).
The holder writes producers/<token>.beat again and again. A newcomer takes the next token when the last holder said that
it is done, when its process is seen to be dead, or when the beat did not change for `TTL_S` seconds of the newcomer's
own clock; clocks of two machines are never compared. A holder that slept through that finds the higher token and stops.
Safety does not rest on this: units are committed once whoever writes them. It saves the work of doing them twice.
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
from typing import Any

from sae_dist.config import UserError
from sae_dist.shards import format
from sae_dist.storage import Storage, StorageError

logger = logging.getLogger(__name__)

TTL_S = 30.0
BEATS = 6  # in TTL_S: one that comes late does not end a lease


class RunLease:
    """The right to produce; `check` says when somebody else has taken it."""

    def __init__(self, storage: Storage, token: int, ttl_s: float) -> None:
        self.token, self._storage, self._ttl_s = token, storage, ttl_s
        self._lost_to: str | None = None
        self._beats, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lease", daemon=True)
        self._beat()
        self._thread.start()

    def check(self) -> None:
        """UserError once another driver holds the store."""
        if self._lost_to is not None:
            raise UserError(
                f"store={self._storage.uri} was taken over by {self._lost_to} while this driver gave no sign of life "
                f"for {self._ttl_s:.0f} s; nothing is lost, that one goes on"
            )

    def release(self) -> None:
        """Another driver may begin at once."""
        self._end.set()
        self._thread.join()
        if self._lost_to is None:
            try:
                self._beat(released=True)
            except (StorageError, OSError) as error:
                logger.warning("the store does not take the end of this run's lease (%s); it ends by itself", error)

    def _beat(self, *, released: bool = False) -> None:
        self._beats += 1
        self._storage.write(_beat_key(self.token), format.seal({"beat": self._beats, "released": released}))

    def _keep(self) -> None:
        while not self._end.wait(self._ttl_s / BEATS):
            try:
                newest = _newest(self._storage)
                if newest > self.token:
                    self._lost_to = _described(_holder(self._storage, newest))
                    return
                self._beat()
            except (StorageError, OSError) as error:
                logger.warning("the store does not take this run's sign of life (%s); trying again", error)


@contextmanager
def run_lease(storage: Storage, out: str, *, ttl_s: float = TTL_S) -> Iterator[RunLease]:
    """Holds the store for as long as the context lasts; UserError while another driver does."""
    lease = RunLease(storage, _acquire(storage, out, ttl_s), ttl_s)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(storage: Storage, out: str, ttl_s: float) -> int:
    while True:
        newest = _newest(storage)
        if newest and not _is_over(storage, newest, ttl_s):
            raise UserError(
                f"store={storage.uri} is being filled by {_described(_holder(storage, newest))}; wait for it, stop it, "
                "or choose another store="
            )
        name = uuid.uuid4().hex
        key = _holder_key(newest + 1)
        storage.create(key, format.seal({"name": name, "out": out, **_identity(os.getpid())}))
        if _holder(storage, newest + 1)["name"] == name:  # read back: the answer to `create` may have been lost
            return newest + 1


def _is_over(storage: Storage, token: int, ttl_s: float) -> bool:
    """Whether the holder of `token` is done or dead; takes up to `ttl_s` to say so of one on another machine."""
    holder, here = _holder(storage, token), _identity(os.getpid())
    before = _beat_of(storage, token)
    if before.get("released"):
        return True
    if "machine" in here and holder.get("machine") == here["machine"]:
        return holder != holder | _identity(holder["pid"])  # gone, or another process by that number
    logger.info("store=%s belongs to %s; waiting %.0f s for a sign of life", storage.uri, _described(holder), ttl_s)
    until = time.monotonic() + ttl_s
    while time.monotonic() < until:
        time.sleep(min(ttl_s / BEATS, max(until - time.monotonic(), 0)))
        now = _beat_of(storage, token)
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


def _newest(storage: Storage) -> int:
    found = (re.fullmatch(r"producers/(\d{6,})\.json", entry.key) for entry in storage.list("producers/"))
    return max((int(match[1]) for match in found if match), default=0)


def _holder(storage: Storage, token: int) -> dict[str, Any]:
    return format.read_record(storage, _holder_key(token), f"{storage.uri}/{_holder_key(token)}")


def _beat_of(storage: Storage, token: int) -> dict[str, Any]:
    try:
        return format.read_record(storage, _beat_key(token), f"{storage.uri}/{_beat_key(token)}")
    except FileNotFoundError:
        return {}


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} (out={holder['out']})"


def _holder_key(token: int) -> str:
    return f"producers/{token:06d}.json"


def _beat_key(token: int) -> str:
    return f"producers/{token:06d}.beat"
