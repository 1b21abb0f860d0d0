"""A lease in a storage: one process at a time works there, across machines.

<folder>/<token>.json is created once and names the holder; the highest token counts (a fencing token: it only grows).
The holder rewrites <folder>/<token>.beat regularly. Another process takes the next token when the holder has released
its lease, when its process is dead, or when the beat did not change for `TTL_S` seconds of the other's own clock, in
which the storage answered; clocks of two machines are never compared. A holder that was suspended meanwhile finds the
higher token and stops.
A store stays correct without this, because units are committed once; the lease saves duplicate work.
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
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field

from sae_dist.config import UserError
from sae_dist.shards import records
from sae_dist.shards.records import Count, Hash
from sae_dist.storage import Storage

logger = logging.getLogger(__name__)

TTL_S = 30.0
BEATS = 6  # in TTL_S, so that a late one does not end the lease
PROC = Path("/proc")
T = TypeVar("T")


class LeaseHolder(NamedTuple):
    """<token>.json: the process that took the place."""

    name: Hash  # random
    out: str  # the folder of its run
    host: str
    pid: Annotated[int, Field(ge=1)]
    born: str | None = None  # ticks since boot; None where it cannot be told (no /proc)
    machine: str | None = None  # boot id and process namespace; None without /proc


class Heartbeat(NamedTuple):
    """<token>.beat: the last sign of life of the holder."""

    beat: Count  # a counter
    released: bool  # the holder has released the lease


class LeasedPlace(NamedTuple):
    """A storage, and the folder in it with the lease's files."""

    storage: Storage
    key: str  # the configuration key that names the storage, for messages
    folder: str  # the folder of the lease's files

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

    def take(self, token: int, holder: LeaseHolder) -> None:
        self.storage.create(f"{self.folder}/{token:06d}.json", records.seal(holder._asdict()))

    def holder(self, token: int) -> LeaseHolder | None:
        """The holder of that token; None, with a warning, when the file is damaged: then its beat alone decides."""
        return self._read(LeaseHolder, f"{self.folder}/{token:06d}.json")

    def beat(self, token: int, beat: Heartbeat) -> None:
        self.storage.write(f"{self.folder}/{token:06d}.beat", records.seal(beat._asdict()))

    def last_beat(self, token: int) -> Heartbeat | None:
        """The last sign of life; None, with a warning, when the file is damaged, which counts as no change."""
        return self._read(Heartbeat, f"{self.folder}/{token:06d}.beat")

    def _read(self, kind: type[T], key: str) -> T | None:
        place = f"{self.storage.uri}/{key}"
        try:
            record = records.read(self.storage, key, place)
            return records.checked(kind, {name: value for name, value in record.items() if name != "digest"}, place)
        except FileNotFoundError:
            return None
        except records.CorruptData as damage:
            logger.warning("%s; only signs of life tell whether %s is in use", damage, self.name)
            return None


class Lease:
    """A lease that is held and renewed by a thread; `check` raises once it was lost."""

    def __init__(self, place: LeasedPlace, token: int, ttl_s: float) -> None:
        self.token, self._place, self._ttl_s = token, place, ttl_s
        self._lost_to: str | None = None
        self._failure: Exception | None = None  # that ended the thread
        self._beats, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._beat()
        self._thread.start()

    def check(self) -> None:
        """UserError once another process has taken the lease; RuntimeError once it is not renewed any more."""
        if self._lost_to is not None:
            raise UserError(
                f"{self._place.name} was taken over by {self._lost_to} while this process gave no sign of life for "
                f"{self._ttl_s:.0f} s; nothing is lost, that process continues"
            )
        if self._failure is not None:
            what = f"{type(self._failure).__name__}: {self._failure}"
            raise RuntimeError(f"{self._place.name}: the lease is not renewed any more ({what})") from self._failure

    def producer(self, attempt: int) -> str:
        """The prefix of the names of data that the holder writes in its attempt number `attempt`."""
        return f"{self.token:06d}-{attempt}-"

    def release(self) -> None:
        """Releases the lease, so that another process can take it at once."""
        self._end.set()
        self._thread.join()
        if self._lost_to is None and self._failure is None:
            try:
                self._beat(released=True)
            except (UserError, OSError) as error:
                logger.warning("%s: the lease could not be released (%s); it expires", self._place.name, error)

    def _beat(self, *, released: bool = False) -> None:
        self._beats += 1
        self._place.beat(self.token, Heartbeat(self._beats, released))

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
            except Exception as error:  # a silent end of this thread would leave two holders
                self._failure = error
                logger.exception("%s: the lease is not renewed any more", self._place.name)
                return


@contextmanager
def lease(storage: Storage, out: str, *, key: str, folder: str, ttl_s: float = TTL_S) -> Iterator[Lease]:
    """Holds the lease for as long as the context lasts; UserError while another process has it.

    out: names the holder in messages; key: the configuration key that names the storage; folder: of the lease's files
    """
    place = LeasedPlace(storage, key, folder)
    held = Lease(place, _acquire(place, out, ttl_s), ttl_s)
    try:
        yield held
    finally:
        held.release()


def _acquire(place: LeasedPlace, out: str, ttl_s: float) -> int:
    while True:
        newest = place.newest()
        holder = place.holder(newest) if newest else None
        if newest and not _is_over(place, newest, holder, ttl_s):
            raise UserError(
                f"{place.name} is in use by {_described(holder)}; wait for it, stop it, or choose another {place.key}="
            )
        ours = LeaseHolder(uuid.uuid4().hex, out, **_identity(os.getpid()))
        place.take(newest + 1, ours)
        if place.holder(newest + 1) == ours:  # read back: the answer to `create` may have been lost
            return newest + 1


def _is_over(place: LeasedPlace, token: int, holder: LeaseHolder | None, ttl_s: float) -> bool:
    """Whether the holder of `token` is done or dead; waits up to `ttl_s` when it is on another machine."""
    if (known := is_over(place, token, holder)) is not None:
        return known
    silence = Silence(place, token, ttl_s)
    logger.info("%s belongs to %s; waiting %.0f s for a sign of life", place.name, _described(holder), ttl_s)
    while not silence.too_long:
        time.sleep(ttl_s / BEATS)
        if (beat := silence.look()) is not None:
            return beat.released
    return True


class Silence:
    """For how long a holder has given no sign of life, as a process finds that looks again and again.

    From one look to the next no more than the time of a beat counts, and nothing where the answer took longer than
    that: while the storage stalls, a holder that lives cannot write its beat either.
    """

    def __init__(self, place: LeasedPlace, token: int, ttl_s: float) -> None:
        self._place, self._token, self._ttl_s = place, token, ttl_s
        self._last, self._at, self._seconds = place.last_beat(token), time.monotonic(), 0.0

    def look(self) -> Heartbeat | None:
        """Looks once; the sign of life, where there is a new one."""
        began, before = time.monotonic(), self._at
        beat, most = self._place.last_beat(self._token), self._ttl_s / BEATS
        self._at = time.monotonic()
        if beat is not None and beat != self._last:
            self._last, self._seconds = beat, 0.0
            return beat
        if self._at - began > most:
            logger.info("%s took %.0f s to answer; waiting anew", self._place.name, self._at - began)
            self._seconds = 0.0
        else:
            self._seconds += min(self._at - before, most)
        return None

    @property
    def too_long(self) -> bool:
        """Whether it has lasted for `ttl_s`."""
        return self._seconds >= self._ttl_s


def is_over(place: LeasedPlace, token: int, holder: LeaseHolder | None) -> bool | None:
    """Whether the holder of `token` is done or dead, as far as can be told at once; None: only its beats will tell."""
    here, last = _identity(os.getpid())["machine"], place.last_beat(token)
    if last is not None and last.released:
        return True
    if holder is not None and here is not None and holder.machine == here:
        return _is_dead(holder)
    return None


def _is_dead(holder: LeaseHolder) -> bool | None:
    """Whether a holder of this machine is dead; None where that cannot be told.

    Its host is not asked for: one machine may have several names, of containers or one after the other.
    """
    try:
        born = _born(holder.pid)
    except OSError:  # there is none, or /proc hides the processes of other users (hidepid)
        return True if _is_missing(holder.pid) else None
    if born is None:
        return True
    return None if holder.born is None else born != holder.born  # another process with the same number


def _is_missing(pid: int) -> bool:
    """Whether there is no process of that number, as far as the kernel says."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False


def _identity(pid: int) -> dict[str, Any]:
    """The fields of a LeaseHolder that identify a process."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "born": None, "machine": None}
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        found["machine"] = f"{boot} {os.readlink(PROC / 'self/ns/pid')}"
        found["born"] = _born(pid)
    except OSError:  # no such process, or no /proc
        pass
    return found


def _born(pid: int) -> str | None:
    """When the process began; None for a zombie, which is dead. OSError where /proc does not show it."""
    fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _described(holder: LeaseHolder | None) -> str:
    if holder is None:
        return "a process that its record does not name"
    return f"process {holder.pid} on {holder.host} (out={holder.out})"
