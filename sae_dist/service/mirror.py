"""A copy of a run's small files and results on object storage, kept up to date beside the run (mirror=).

`sae-dist status` reads it from anywhere. The run never waits for it before its end, and a copy that fails is a warning.
"""

import functools
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.run_files import parse_yaml
from sae_dist.service.config import identity
from sae_dist.service.periodic import Periodic

logger = logging.getLogger(__name__)

EVERY_S = 10.0
RETRY_S = 15.0  # a request that fails for longer has failed
BYTES_PER_S = 1e6  # a file that grows is copied again only after so long that it costs no more than this
MAPPED_BYTES = 64 << 20  # larger files are not read as a whole: weights, which are never changed in place
LIVE = ("config.yaml", "status.json", "metrics.jsonl")  # config.yaml says whose copy it is
RESULTS = ("evaluate.json", "pages.json", "dictionary", "dictionaries", "pages")  # files and folders of files
LAST = ("config.yaml", "metrics.jsonl", *RESULTS, "summary.json", "status.json")  # a run that is done there is whole


class Mirror:
    """Copies what is new in `out` to `uri` from `start` on; `close` copies the rest."""

    def __init__(self, out: Path, uri: str, values: Mapping[str, Any]) -> None:
        """UserError when `uri` cannot be read, or holds something else than a copy of this run (its config: values)."""
        self._out, self._uri = out, uri
        try:
            self._storage = storage.open(uri, retry_s=RETRY_S)
            there = self._storage.local_path("config.yaml")
            if there is not None and there.resolve().is_relative_to(out.resolve()):
                raise UserError("that is in the run's own folder; choose another place")
            _refuse_another_run(self._storage, values)
        except OSError as error:
            raise UserError(f"mirror={uri} cannot be read ({error.strerror}); choose another place") from None
        except storage.Unavailable as error:
            raise storage.Unavailable(f"mirror={uri}: {error}") from None
        except UserError as error:
            raise UserError(f"mirror={uri}: {error}") from None
        self._copied: dict[str, tuple[int, ...]] = {}  # what each file was like when it was copied
        self._due: dict[str, float] = {}  # when each may be copied again
        self._warned, self._warning = False, threading.Lock()
        self._threads: list[Periodic] = []

    def start(self) -> None:
        """Two threads: a large result on its way does not keep the status from being told."""
        self._copy(LIVE[:1])  # before anything else is there
        for name, names in (("mirror", LIVE), ("mirror-results", RESULTS)):
            self._threads.append(Periodic(functools.partial(self._copy, names), every_s=EVERY_S, name=name))

    def close(self) -> None:
        """Copies whatever is not there yet, and the last status at the end."""
        for thread in self._threads:
            thread.close()
        self._due.clear()
        if not self._copy(LAST):
            logger.warning("the copy at mirror=%s is not complete; repeat the command to complete it", self._uri)

    def _copy(self, names: Iterable[str]) -> bool:
        """Copies the files that are new, and the first failure ends it: whether there was none."""
        try:
            for key in _files(self._out, names):
                self._copy_file(key)
        except (OSError, ValueError) as error:  # a StorageError is a ValueError
            with self._warning:
                if not self._warned:
                    logger.warning("mirror=%s cannot be written (%s); the run goes on", self._uri, error)
                self._warned = True
            return False
        return True

    def _copy_file(self, key: str) -> None:
        try:
            file = (self._out / key).open("rb")
        except FileNotFoundError:  # since the folder was listed
            return
        with file:
            found = os.fstat(file.fileno())
            version = found.st_ino, found.st_size, found.st_mtime_ns
            if self._copied.get(key) == version or time.monotonic() < self._due.get(key, 0.0):
                return
            large = found.st_size > MAPPED_BYTES
            data = mmap.mmap(file.fileno(), found.st_size, access=mmap.ACCESS_READ) if large else file.read()
            self._storage.write(key, memoryview(data))
        self._copied[key] = version
        self._due[key] = time.monotonic() + found.st_size / BYTES_PER_S


def _files(out: Path, names: Iterable[str]) -> Iterator[str]:
    """The files of these names, and all in folders of these names, by their path in `out`.

    No links, and nothing that is still being written.
    """
    for name in names:
        if (out / name).is_file():
            yield name
        for folder, folders, files in os.walk(out / name):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            whole = [each for each in sorted(files) if not each.startswith(".") and not each.endswith(".part")]
            paths = [Path(folder) / each for each in whole]
            yield from (path.relative_to(out).as_posix() for path in paths if not path.is_symlink())


def _refuse_another_run(place: storage.Storage, values: Mapping[str, Any]) -> None:
    try:
        found = place.read("config.yaml")
    except FileNotFoundError:
        if (stray := next(iter(place.list("")), None)) is not None:
            raise UserError(f"it holds {stray.key}, and no copy of a run; choose an empty place") from None
        return
    cure = "choose another place, or remove it"
    then = parse_yaml(bytes(found), name=f"{place.uri}/config.yaml", cure=cure)
    before, now = _whose(then), _whose(values)
    if differing := [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]:
        shown = ", ".join(f"{key}={before.get(key)} there, {now.get(key)} here" for key in differing[:4])
        raise UserError(f"it is the copy of another run ({shown}); {cure}")


def _whose(values: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs that may share a copy have in common: here a store counts by its place."""
    return identity(values) | {"store": values.get("store")}
