"""Checkpoints in the background: the training stops only to copy tensors to host memory; a thread writes them."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from sae_dist.storage import Storage
from sae_dist.train import retention
from sae_dist.train.checkpoint import Checkpoint, OwnedRows
from sae_dist.train.checkpoint_manifest import CheckpointManifest
from sae_dist.train.retention import Retention

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # saves in a row that may fail before the training does


class Saver:
    """Saves checkpoints one after the other; `save` waits for the one before. Close it, or use `closing`.

    `write` stores this process's part and returns the checkpoint's folder once it is complete. `run_id` is in the names
    of the run's folders. Only rank 0 removes old checkpoints. `resumed_from` is the folder that the run was read from.
    `tell` is called in the training's thread with the checkpoints that the run may need again (retention.prune). A
    failed save is an alert, and the next one is tried. All processes of a training call `save` at the same steps, and
    so learn of a failure at the same step.
    """

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        retention: Retention,
        *,
        write: Callable[[Checkpoint], str],
        is_rank_0: bool = True,
        resumed_from: str = "",
        tell: Callable[[list[CheckpointManifest]], None] = lambda _: None,
    ) -> None:
        self._storage, self._run_id, self._retention = storage, run_id, retention
        self._write, self._is_rank_0, self._tell = write, is_rank_0, tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[list[CheckpointManifest]] | None = None
        self._sound = [resumed_from] if resumed_from else []
        self._step, self._failures = 0, 0
        self._saved = -1  # the step of the last save that went well
        self._staged: dict[str, Tensor] = {}
        self._seconds, self._waited_s = 0.0, 0.0

    def save(self, state: Checkpoint) -> None:
        """Waits for the previous save and starts to save `state`, whose tensors may change once this returns."""
        self.wait()
        started = time.perf_counter()
        staged = state._replace(tensors={name: self._stage(name, tensor) for name, tensor in state.tensors.items()})
        self._waited_s += time.perf_counter() - started
        self._step = state.step
        self._writing = self._thread.submit(self._save, staged)

    def wait(self) -> None:
        """Waits for the save in progress; raises its error once MAX_FAILURES in a row have failed."""
        if self._writing is None:
            return
        started = time.perf_counter()
        try:
            kept = self._writing.result()
            self._failures, self._saved = 0, self._step
            if kept:
                self._tell(kept)
        except (OSError, ValueError) as error:  # a StorageError is a ValueError
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise
            logger.error("ALERT: the checkpoint of step %d was not saved (%s); training goes on", self._step, error)
        finally:
            self._writing = None
            self._waited_s += time.perf_counter() - started

    def poll(self) -> None:
        """Like `wait`, if the save is done; otherwise returns at once."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def finish(self, state: Checkpoint) -> None:
        """Waits, and saves `state` unless it is saved already; raises the error if that fails."""
        self.wait()
        if self._saved != state.step:
            self.save(state)
            self._failures = MAX_FAILURES
            self.wait()

    def figures(self) -> dict[str, Any]:
        """Seconds of the last save in its thread, and seconds that the training has waited for saves so far."""
        return {"checkpoint_seconds": round(self._seconds, 4), "checkpoint_wait_seconds": round(self._waited_s, 4)}

    def close(self) -> None:
        """Waits for the save in progress and ignores its result."""
        self._thread.shutdown(wait=True)

    def _stage(self, name: str, tensor: Tensor | OwnedRows) -> Tensor | OwnedRows:
        """Copies a tensor into host memory, which is reused for every save."""
        local = tensor.local if isinstance(tensor, OwnedRows) else tensor
        there = self._staged.get(name)
        if there is None or there.shape != local.shape or there.dtype != local.dtype:
            there = self._staged[name] = local.detach().to("cpu", copy=True).contiguous()
        else:
            there.copy_(local.detach())
        return tensor._replace(local=there) if isinstance(tensor, OwnedRows) else there

    def _save(self, state: Checkpoint) -> list[CheckpointManifest]:
        started = time.perf_counter()
        try:
            folder = self._write(state)
        except (OSError, ValueError):
            if self._is_rank_0:  # its files would take space from the next save
                self._tidy(lambda: retention.sweep(self._storage, self._run_id))
            raise
        self._sound.append(folder)
        kept: list[CheckpointManifest] = []
        if self._is_rank_0:
            self._tidy(lambda: kept.extend(self._prune()))
            logger.info("checkpoint %s: %.2f s", folder, time.perf_counter() - started)
        self._seconds = time.perf_counter() - started
        return kept

    def _prune(self) -> list[CheckpointManifest]:
        return retention.prune(self._storage, self._run_id, self._retention, sound=self._sound)

    def _tidy(self, remove: Callable[[], None]) -> None:
        """Calls `remove`; an error there is only a warning, since the next save tries again."""
        try:
            remove()
        except (OSError, ValueError) as error:
            logger.warning("old files were not removed from %s (%s); trying again later", self._storage.uri, error)
