"""What a run leaves: the folder that is its memory, claimed by one process at a time."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from sae_dist.config import Stopped, UserError, to_dict
from sae_dist.monitor import write_json, write_whole
from sae_dist.service.config import identity

CLAIM_TRIES = 5


class RunFolder:
    """`out`, held for as long as this process lives: the kernel lets go of the lock however the process ends."""

    def __init__(self, path: Path, config: object) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out={path} cannot be made ({error.strerror}); choose another out=") from None
        values = to_dict(config)
        self._lock = claim(path)
        try:
            _refuse_another_run(path, values)
        except UserError:
            self._lock.close()
            raise
        write_whole(path / "config.yaml", yaml.safe_dump(values, sort_keys=False))
        self._started, self._seconds_before = time.monotonic(), float(read_status(path).get("wall_seconds", 0.0))

    @property
    def wall_seconds(self) -> float:
        """Seconds that this run has been at work, over all its attempts."""
        return round(self._seconds_before + time.monotonic() - self._started, 1)

    def status(self, state: str, **facts: Any) -> None:
        """Writes status.json: what the run is doing now, for `sae-dist status` and for people."""
        content = {"state": state, "time": round(time.time(), 1), "pid": os.getpid(), "wall_seconds": self.wall_seconds}
        write_json(self.path / "status.json", content | facts)

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Lets go of the folder at the end, and leaves in status.json how it ended if it did not end well."""
        try:
            yield
        except (Stopped, KeyboardInterrupt) as stopped:
            self.status("stopped", note=f"{str(stopped) or 'Ctrl-C'}; the same command goes on from here")
            raise
        except UserError as error:
            self.status("refused", note=str(error))
            raise
        except Exception as error:
            self.status("failed", note=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.close()

    def close(self) -> None:
        self._lock.close()


def read_status(path: Path) -> dict[str, Any]:
    """status.json; empty when there is none, or what a full disk left of one."""
    try:
        return json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def is_claimed(path: Path) -> bool:
    """Whether a process works on this run now. Asking does not get in the way of one that is about to."""
    try:
        with (path / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def claim(path: Path) -> IO[str]:
    """The run's lock file, held until it is closed; UserError while another process holds it."""
    lock = (path / ".lock").open("a+")
    try:
        for _ in range(CLAIM_TRIES - 1):  # somebody may just be asking whether the run is claimed
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            time.sleep(0.1)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        holder = read_status(path).get("pid", "unknown")
        raise UserError(
            f"out={path} is in use by process {holder}; wait for it, stop it, or choose another out="
        ) from None
    return lock


def _refuse_another_run(path: Path, values: dict[str, Any]) -> None:
    """A repeated command goes on; a different one in the same folder would mix two runs."""
    if not (path / "config.yaml").is_file():
        return
    earlier: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    then, now = identity(earlier), identity(values)
    differing = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if differing:
        shown = ", ".join(f"{key}={then.get(key)} there, {now.get(key)} here" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(f"out={path} holds another run ({shown}{more}); choose another out= or remove that folder")
