"""A watchdog for ranks on GPUs: no exception can interrupt a wait for a GPU.

A gloo exchange that times out raises. An nccl exchange is work of the GPU: a process that reads a result waits in the
driver, and only its end releases the GPU. So a thread reads the heartbeats of the others and ends this process, with a
line that names them, once one has been silent for too long; whoever started the ranks (Ray, torchrun) starts them
again. nccl's own watchdog, which does not know which rank is missing, waits MARGIN_S longer; it catches exchanges that
hang although all ranks have heartbeats.
"""

import logging
import os
import threading

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from sae_dist.train.parallel.heartbeat import EVERY_S, HeartbeatMonitor

logger = logging.getLogger(__name__)

MARGIN_S = 10.0  # that nccl waits longer than mesh.collective_timeout_s


class Watchdog:
    """Ends this process once another rank has been silent for `timeout_s`; close it at the end of the session."""

    def __init__(self, store: Store, rank: int, world: int, timeout_s: float) -> None:
        self._listener, self._rank, self._timeout_s = HeartbeatMonitor(store, world), rank, timeout_s
        self._others = [other for other in range(world) if other != rank]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join(timeout=2 * EVERY_S)

    def _watch(self) -> None:
        while not self._end.wait(EVERY_S):
            try:
                self._listener.poll()
            except RuntimeError:  # the server of the store is gone: no heartbeats to read
                return
            silent = self._listener.silent(self._timeout_s, among=self._others)
            if silent is not None:
                logger.error("rank %d ends, its GPU waits for others: %s", self._rank, silent)
                os._exit(1)
