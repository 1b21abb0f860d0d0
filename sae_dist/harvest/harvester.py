"""Harvests units in two threads: one runs the model, the other turns activations into rows and commits them.

At most two units are in memory. When storage is slower, the model waits, which is counted as `blocked_s`.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from sae_dist import faults
from sae_dist.allocator import keep_freed_memory
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.forward import UnitStates, batch_sequences, forward, to_rows
from sae_dist.harvest.units import sequences_of
from sae_dist.model.engine import Engine
from sae_dist.shards.reader import Store
from sae_dist.shards.writer import write_unit_once
from sae_dist.text.stream import Sequences
from sae_dist.text.tokenize import TokenSplit

logger = logging.getLogger(__name__)


class UnitReport(NamedTuple):
    """The rows of one unit and the seconds that its parts took; parts of different units overlap."""

    unit: int
    positions: int  # run through the model
    rows: int
    outliers: int
    nonfinite: int
    duplicate: bool  # another process had committed it
    gather_s: float  # reading its tokens
    forward_s: float
    copy_s: float  # copying activations to the host after the last forward pass
    write_s: float  # rows, encoding, storage, commit
    blocked_s: float  # the model waited for storage
    flop: float  # of the forward passes


class Progress(NamedTuple):
    """What was done so far: a sign of life that changes with every batch, request to storage and commit.

    Requests that storage refuses count, too: a replica that waits for its storage is alive, and another one in its
    place would wait for the same.
    """

    positions: int
    units: int
    requests: int


class Harvester:
    """Harvests units from an engine into a store; close it.

    In a tensor-parallel replica every process has one and gets the same units with the same turns; the process that
    leads writes, the others only run their part of the model.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        hooks: Sequence[str],
        *,
        split: TokenSplit,
        config: HarvestConfig,
        leads: bool = True,
    ) -> None:
        if engine.device.type == "cpu":
            keep_freed_memory()
        self._engine, self._store, self._hooks = engine, store, tuple(hooks)
        self._split, self._config, self._leads = split, config, leads
        self._batch = batch_sequences(engine, hooks, config)
        self._flop_per_token = engine.flop_per_token(hooks, config.context)
        self._model = ThreadPoolExecutor(1, "model")
        self._writer = ThreadPoolExecutor(1, "writer")
        self._room = threading.Semaphore(2)  # one unit in the model, one on its way out
        self._turn, self._turns = 0, threading.Condition()
        self._positions = self._units = 0

    @property
    def progress(self) -> Progress:
        return Progress(self._positions, self._units, self._store.storage.requests)

    def harvest(self, unit: int, turn: int | None = None, *, producer: str = "") -> UnitReport | None:
        """Harvests one unit and commits it; blocks until then. Thread-safe.

        Units run in the order of their turns, 0 1 2 ..., or as they come if `turn` is None. `producer` is recorded in
        the commit. Returns None in processes of a tensor-parallel replica that do not lead.
        """
        with self._turns:
            self._turns.wait_for(lambda: turn in (None, self._turn))
            self._turn += 1
            written = self._model.submit(self._through_the_model, unit, producer)
            self._turns.notify_all()
        outcome = written.result()
        return None if outcome is None else outcome.result()

    def close(self) -> None:
        """Waits for the units that were started."""
        self._model.shutdown()
        self._writer.shutdown()

    def _through_the_model(self, unit: int, producer: str) -> Future[UnitReport] | None:
        began = time.monotonic()
        self._room.acquire()
        blocked_s = time.monotonic() - began
        try:
            began = time.monotonic()
            work = sequences_of(unit, self._config)
            stream = self._split.heldout if work.heldout else self._split.train
            sequences = stream.sequences(work.sequences)
            gather_s = time.monotonic() - began
            faults.point("harvester.before_forward", unit=unit)
            states = self._forward(sequences)
            faults.point("harvester.after_forward", unit=unit)
            if self._leads:
                return self._writer.submit(
                    self._write, unit, sequences, states, gather_s=gather_s, blocked_s=blocked_s, producer=producer
                )
        except BaseException:
            self._room.release()
            raise
        self._room.release()
        self._units += 1
        return None

    def _forward(self, sequences: Sequences) -> UnitStates:
        while True:
            try:
                return forward(
                    self._engine, self._hooks, sequences=sequences, batch=self._batch, progress=self._advance
                )
            except torch.cuda.OutOfMemoryError:
                # not in a tensor-parallel replica: the other processes would wait for this one in the middle of a pass
                if self._batch == 1 or self._config.tensor_parallel > 1:
                    raise
                self._batch = -(-self._batch // 2)
                torch.cuda.empty_cache()
                logger.warning("out of GPU memory: %d sequences a batch from now on", self._batch)

    def _write(
        self, unit: int, sequences: Sequences, states: UnitStates, *, gather_s: float, blocked_s: float, producer: str
    ) -> UnitReport:
        try:
            began = time.monotonic()
            kept = to_rows(self._engine, states.states, sequences=sequences, config=self._config)
            states.states.clear()  # rows are copies
            written = write_unit_once(
                self._store, unit, kept.states, doc=kept.doc, pos=kept.pos, token=kept.token, producer=producer,
                max_nonfinite=self._config.max_nonfinite_fraction,
            )  # fmt: skip
            self._units += 1
            return UnitReport(
                unit, kept.positions, len(kept.doc), kept.outliers, kept.nonfinite, not written.won,
                gather_s, states.forward_s, states.copy_s, time.monotonic() - began, blocked_s,
                self._flop_per_token * kept.positions,
            )  # fmt: skip
        finally:
            self._room.release()

    def _advance(self, positions: int) -> None:
        self._positions += positions
