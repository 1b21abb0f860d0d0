"""The windows of slices that lanes serve from: read ahead by a few threads, dropped when they are served."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

from sae_dist.shards import order
from sae_dist.shards.order import OrderConfig, Round
from sae_dist.shards.reader import Store
from sae_dist.shards.slices import Slice

WindowId = tuple[int, int, int, int]  # epoch, round, lane, window


class LoaderClosed(Exception):
    """The consumer closed the loader while its thread was waiting."""


class Window(NamedTuple):
    """The slices of one window and the order of their rows; ids lie end to end, so that a lane needs one look-up."""

    first: int  # row of the lane that the window begins with
    rows: Int64[np.ndarray, " rows"]  # rows of the lane in the order in which they are served
    slices: dict[tuple[int, int], dict[str, Slice]]  # by unit and slice, then by hook point
    doc: UInt64[np.ndarray, " rows"]
    pos: UInt32[np.ndarray, " rows"]
    token: UInt32[np.ndarray, " rows"]


class WindowPool:
    """Windows of some hook points, by lane; used by one thread, filled by `threads` others."""

    def __init__(
        self, store: Store, hooks: Sequence[str], config: OrderConfig, seed: int, *, threads: int, stop: threading.Event
    ):
        self.store, self.hooks, self.config, self.seed, self.stop = store, hooks, config, seed, stop
        self.read_s = 0.0  # seconds that the loader waited for bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="slices")
        self._coming: dict[WindowId, list[Future[dict[str, Slice]]]] = {}
        self._open: dict[WindowId, Window] = {}

    def submit(self, round: Round, lane: int, window: int) -> None:
        """Starts to read the slices of a window, once."""
        name = (round.epoch, round.number, lane, window)
        if name in self._coming or name in self._open or self.stop.is_set():
            return
        dealt = round.lanes[lane]
        chosen = range(window * self.config.window, min((window + 1) * self.config.window, len(dealt.unit)))
        self._coming[name] = [
            self._pool.submit(self.store.read_slices, self.hooks, int(dealt.unit[i]), int(dealt.slice[i]))
            for i in chosen
        ]

    def is_open(self, round: Round, lane: int, window: int) -> bool:
        return (round.epoch, round.number, lane, window) in self._open

    def get(self, round: Round, lane: int, window: int) -> Window:
        """The window; waits for its slices."""
        name = (round.epoch, round.number, lane, window)
        if name not in self._open:
            self.submit(round, lane, window)
            self._open[name] = self._assemble(round, lane, window, self._coming.pop(name))
        return self._open[name]

    def drop(self, round: Round, lane: int, window: int) -> None:
        """Drops a window; its memory is freed once no unfinished batch refers to it."""
        del self._open[round.epoch, round.number, lane, window]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _assemble(self, round: Round, lane: int, window: int, coming: list[Future[dict[str, Slice]]]) -> Window:
        rows = order.window_permutation(self.config, self.seed, round, lane, window)
        started = time.perf_counter()
        slices = [self._wait(future) for future in coming]
        self.read_s += time.perf_counter() - started
        dealt, at = round.lanes[lane], window * self.config.window
        ids = [part[self.hooks[0]] for part in slices]  # they are the same at every hook point
        return Window(
            int(dealt.start[at]),
            rows,
            {(int(dealt.unit[at + i]), int(dealt.slice[at + i])): part for i, part in enumerate(slices)},
            np.concatenate([part.doc for part in ids]),
            np.concatenate([part.pos for part in ids]),
            np.concatenate([part.token for part in ids]),
        )

    def _wait(self, future: Future[dict[str, Slice]]) -> dict[str, Slice]:
        while True:
            if self.stop.is_set():
                raise LoaderClosed
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():  # the read itself timed out
                    raise
