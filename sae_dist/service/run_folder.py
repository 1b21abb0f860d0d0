"""The folder of a run: its configuration and status, locked by one process at a time."""

import contextlib
import fcntl
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, NotRequired

import yaml
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from sae_dist.config import Stopped, UserError, to_dict
from sae_dist.monitor.config import public, public_arguments
from sae_dist.run_files import read_json, read_yaml, write_json, write_whole
from sae_dist.service.config import identity
from sae_dist.service.mirror import Mirror
from sae_dist.service.periodic import Periodic
from sae_dist.storage import Unavailable
from sae_dist.system_errors import user_error

logger = logging.getLogger(__name__)

CLAIM_TRIES = 5
LOCK = ".lock"  # held by the process that works on the run
ENDED = ("done", "stopped", "refused", "failed")  # states in which no process works on the run
HEARTBEAT_S = 10.0  # status.json is written again after so long, whether there is something new or not
LEAST_S = 0.5  # and not sooner than this while the state is the same
STATUS_CURE = "remove it: the run writes a new one when it goes on"
CONFIG_CURE = "take it from a copy of the run, or remove it and repeat the run's command, which writes it"


class RunFolder:
    """`out`, locked until `close`; the kernel releases the lock however the process ends."""

    def __init__(self, path: Path, config: object) -> None:
        self.path, values = path, to_dict(config)
        self._mirror: Mirror | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = claim(path)
            try:
                _refuse_another_run(path, values)
                if (place := values.get("mirror")) is not None:
                    self._mirror = Mirror(path, place, values)
                write_whole(path / "config.yaml", yaml.safe_dump(public(values), sort_keys=False))
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise UserError(f"out={path} cannot be written ({error.strerror}); choose another out=") from None
        self._started, self._seconds_before = time.monotonic(), _seconds_before(path)
        self._state, self._facts = "", {}
        self._changed, self._written = time.time(), time.monotonic()
        self._one_writer = threading.Lock()
        self._heartbeat = Periodic(self._beat, every_s=HEARTBEAT_S / 2, name="heartbeat")
        if self._mirror is not None:
            self._mirror.start()

    @property
    def wall_seconds(self) -> float:
        """Seconds that this run has worked, over all its attempts."""
        return round(self._seconds_before + time.monotonic() - self._started, 1)

    def status(self, state: str, **facts: Any) -> None:
        """What the run is doing now, for status.json, from which `sae-dist status` and people read it.

        A new state is written at once, new facts within HEARTBEAT_S.
        """
        with self._one_writer:
            new = state != self._state
            if new or facts != self._facts:
                self._changed = time.time()
            self._state, self._facts = state, facts
            if new or time.monotonic() - self._written >= LEAST_S:
                self._write()

    def _beat(self) -> None:
        """Writes status.json again: a file that grows old says that this process is gone."""
        with self._one_writer:
            if self._state in ("", *ENDED) or time.monotonic() - self._written < HEARTBEAT_S:
                return
            try:
                self._write()
            except OSError as error:
                logger.warning("status.json is old: %s", user_error(error) or error)

    def _write(self) -> None:
        content = {
            "state": self._state, "time": round(time.time(), 1), "changed": round(self._changed, 1),
            "wall_seconds": self.wall_seconds, "pid": os.getpid(), "host": socket.gethostname(), **_command(),
        }  # fmt: skip
        write_json(self.path / "status.json", content | self._facts)
        self._written = time.monotonic()

    def done(self, summary: Mapping[str, Any]) -> None:
        """Writes the status of a finished run, with its alerts."""
        alerts = {"alerts": summary["alerts"]} if summary.get("alerts") else {}
        self.status("done", step=summary["steps"], tokens=summary["tokens_trained"], **alerts)

    @contextmanager
    def recording_outcome(self) -> Iterator[None]:
        """Unlocks the folder at the end; if an error ended the run, status.json says which."""
        try:
            yield
        except (Stopped, KeyboardInterrupt) as stopped:
            self._ended("stopped", f"{str(stopped) or 'Ctrl-C'}; run the same command again to resume")
            raise
        except Unavailable as error:
            self._ended("stopped", str(error))
            raise
        except UserError as error:
            self._ended("refused", str(error))
            raise
        except Exception as error:
            if (refused := user_error(error)) is not None:
                self._ended("refused", str(refused))
                raise refused from error
            self._ended("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self.close()

    def _ended(self, state: str, note: str) -> None:
        """Writes the state that the run ends in; a full disk is only a warning here."""
        try:
            self.status(state, note=note)
        except OSError as error:
            logger.warning("status.json still says something else: %s", user_error(error) or error)

    def close(self) -> None:
        """Lets go of the folder, once the copy of it is up to date."""
        try:
            self._heartbeat.close()
            if self._mirror is not None:
                self._mirror.close()
        finally:
            self._lock.close()


Fact = str | int | float | None
Facts = dict[str, Fact | dict[str, Fact]]


class Status(TypedDict):
    """status.json; each phase (text, harvest, train) has facts."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    state: str
    time: Annotated[float, Field(ge=0, lt=1e12)]
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    wall_seconds: Annotated[float, Field(ge=0, lt=1e12)]
    changed: NotRequired[Annotated[float, Field(ge=0, lt=1e12)]]  # since when it says the same
    host: NotRequired[str]
    command: NotRequired[str]  # that repeats the run, in
    directory: NotRequired[str]
    note: NotRequired[str]
    alerts: NotRequired[list[str]]
    text: NotRequired[Facts]
    harvest: NotRequired[Facts]
    train: NotRequired[Facts]


def read_status(path: Path) -> Status | None:
    """status.json; None when there is none, UserError when it is damaged."""
    if not os.path.lexists(path / "status.json"):
        return None
    return read_json(path / "status.json", Status, cure=STATUS_CURE)


def _command() -> dict[str, str]:
    """What a person types to repeat this run, and where; nothing where other programs started it."""
    program = Path(sys.argv[0])
    ours = program.name == "sae-dist" or program.parts[-2:] == ("sae_dist", "__main__.py")
    if not ours or "TORCHELASTIC_RUN_ID" in os.environ:
        return {}
    command = shlex.join(["sae-dist", *public_arguments(sys.argv[1:])])
    return {"command": command, "directory": os.getcwd()}


def _seconds_before(path: Path) -> float:
    """Seconds of work of earlier attempts; 0 with a warning when status.json is damaged."""
    try:
        before = read_status(path)
    except UserError as damage:
        logger.warning("%s; counting the seconds of this run anew", damage)
        return 0.0
    return 0.0 if before is None else before["wall_seconds"]


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml of a run's folder; UserError when it is missing or damaged."""
    return read_yaml(path / "config.yaml", cure=CONFIG_CURE)


def is_claimed(path: Path) -> bool:
    """Whether a process works on this run now; asking does not keep another process from starting."""
    try:
        with (path / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def claim(path: Path) -> IO[str]:
    """The run's lock file, held until it is closed; UserError while another process holds it."""
    lock, holder = (path / LOCK).open("a+"), "unknown"
    try:
        for _ in range(CLAIM_TRIES - 1):  # `is_claimed` of another process may hold it for a moment
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            time.sleep(0.1)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        with contextlib.suppress(UserError):  # a damaged status.json: the message does without the process number
            holder = status["pid"] if (status := read_status(path)) is not None else holder
        raise UserError(
            f"out={path} is in use by process {holder}; wait for it, stop it, or choose another out="
        ) from None
    return lock


def _refuse_another_run(path: Path, values: dict[str, Any]) -> None:
    """UserError when the folder has a run with other settings, which must not be mixed."""
    if not os.path.lexists(path / "config.yaml"):
        return
    then, now = identity(read_config(path)), identity(values)
    differing = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if differing:
        shown = ", ".join(f"{key}={then.get(key)} there, {now.get(key)} here" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(f"out={path} holds another run ({shown}{more}); choose another out= or remove that folder")
