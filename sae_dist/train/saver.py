"""Checkpoints beside the training: it stops for a copy to host memory only, a thread writes what was copied."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from sae_dist.storage import Storage
from sae_dist.train import checkpoint, retention
from sae_dist.train.checkpoint import Checkpoint, Manifest, Rows
from sae_dist.train.retention import Retention

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # saves in a row that may fail before the training does


class Saver:
    """Saves checkpoints one after the other; `save` waits for the one before. Close it, or use `closing`.

    `write` puts what this process holds into the storage, and returns once the checkpoint counts; `leads` is true for
    the one process of a training that removes old ones; `went_on_from` is the folder that the run was read from. A
    failed save is an alert, not the end: the next one may succeed. All processes of a training call `save` at the same
    steps, and so hear of a failure at the same step.
    """

    def __init__(
        self,
        storage: Storage,
        retention: Retention,
        *,
        write: Callable[[Storage, Checkpoint], str] = checkpoint.save,
        leads: bool = True,
        went_on_from: str = "",
    ) -> None:
        self._storage, self._retention, self._write, self._leads = storage, retention, write, leads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[list[Manifest]] | None = None
        self._sound = [went_on_from] if went_on_from else []
        self._step, self._failures = 0, 0
        self._saved: tuple[int, list[Manifest]] = (-1, [])  # the step of the last save that went well, what it gave
        self._staged: dict[str, Tensor] = {}
        self._seconds, self._waited_s = 0.0, 0.0

    def save(self, state: Checkpoint) -> list[Manifest]:
        """Begins to save `state`, whose tensors may change once this returns; what `wait` gave for the one before."""
        kept = self.wait()
        started = time.perf_counter()
        staged = state._replace(tensors={name: self._stage(name, tensor) for name, tensor in state.tensors.items()})
        self._waited_s += time.perf_counter() - started
        self._step = state.step
        self._writing = self._thread.submit(self._save, staged)
        return kept

    def wait(self) -> list[Manifest]:
        """Waits for the save in flight; the manifests of the checkpoints that a run may go back to, oldest first."""
        if self._writing is None:
            return []
        started = time.perf_counter()
        try:
            kept = self._writing.result()
            self._failures, self._saved = 0, (self._step, kept)
            return kept
        except (OSError, ValueError) as error:  # a StorageError is a ValueError
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise
            logger.error("ALERT: the checkpoint of step %d was not saved (%s); training goes on", self._step, error)
            return []
        finally:
            self._writing = None
            self._waited_s += time.perf_counter() - started

    def poll(self) -> list[Manifest]:
        """`wait`, if there is nothing to wait for."""
        return self.wait() if self._writing is not None and self._writing.done() else []

    def finish(self, state: Checkpoint) -> list[Manifest]:
        """Waits, and saves first what is not saved yet; a failure is raised, since nothing comes after."""
        self.wait()
        if self._saved[0] == state.step:
            return self._saved[1]
        self.save(state)
        assert self._writing is not None
        self._failures = MAX_FAILURES
        return self.wait()

    def figures(self) -> dict[str, Any]:
        """Seconds that the last save took in its thread, and that the training has waited for saves so far."""
        return {"checkpoint_seconds": round(self._seconds, 4), "checkpoint_wait_seconds": round(self._waited_s, 4)}

    def close(self) -> None:
        """Lets the save in flight end; what it came to does not matter any more."""
        self._thread.shutdown(wait=True)

    def _stage(self, name: str, tensor: Tensor | Rows) -> Tensor | Rows:
        """A copy in host memory that is used again for every save."""
        local = tensor.local if isinstance(tensor, Rows) else tensor
        there = self._staged.get(name)
        if there is None or there.shape != local.shape or there.dtype != local.dtype:
            there = self._staged[name] = local.detach().to("cpu", copy=True).contiguous()
        else:
            there.copy_(local.detach())
        return tensor._replace(local=there) if isinstance(tensor, Rows) else there

    def _save(self, state: Checkpoint) -> list[Manifest]:
        started = time.perf_counter()
        try:
            folder = self._write(self._storage, state)
        except (OSError, ValueError):
            if self._leads:  # what it wrote would take the next one's room
                self._tidy(lambda: retention.sweep(self._storage))
            raise
        self._sound.append(folder)
        kept: list[Manifest] = []
        if self._leads:
            self._tidy(lambda: kept.extend(self._prune()))
            logger.info("checkpoint %s: %.2f s", folder, time.perf_counter() - started)
        self._seconds = time.perf_counter() - started
        return kept

    def _prune(self) -> list[Manifest]:
        return retention.prune(self._storage, sound=self._sound, keep=self._retention.keep, every=self._retention.every)

    def _tidy(self, remove: Callable[[], None]) -> None:
        """Removes files; that it cannot is no failure to save, and the next save tries again."""
        try:
            remove()
        except (OSError, ValueError) as error:
            logger.warning("old files were not removed from %s (%s); trying again later", self._storage.uri, error)
