"""Runs one unit of text through the model: tokens in, rows out."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt32, UInt64
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.rows import RowMask, eligible, row_mask, take_rows
from sae_dist.model.engine import Engine
from sae_dist.text.stream import Sequences
from sae_dist.text.tokenize import separator

CPU_BATCH_TOKENS = 2_048  # on a CPU a larger batch falls out of the caches
COPIES_IN_FLIGHT = 2  # batches whose activations are on their way to the host while the next one is in the model


class UnitStates(NamedTuple):
    """The activations of all positions of a unit, in host memory, and the seconds that they took."""

    states: dict[str, Float[Tensor, "sequences context width"]]
    forward_s: float
    copy_s: float  # seconds that copies still took after the last forward pass


class UnitRows(NamedTuple):
    """The rows of one unit: row i of every hook point is the same token."""

    states: dict[str, Float[Tensor, "rows width"]]
    doc: UInt64[np.ndarray, " rows"]
    pos: UInt32[np.ndarray, " rows"]
    token: Int64[np.ndarray, " rows"]
    positions: int  # positions run through the model
    nonfinite: int
    outliers: int


def batch_sequences(engine: Engine, hooks: Sequence[str], config: HarvestConfig) -> int:
    """Sequences in a forward pass: as configured, or as many as fit `harvest.batch_memory_gb`, in equal batches.

    Computed, not tried out, so that it is the same on every start and an interrupted harvest rounds alike.
    """
    if config.batch_sequences != "auto":
        return config.batch_sequences
    tokens = int(config.batch_memory_gb * 1e9 / engine.bytes_per_token(hooks, config.context))
    if engine.device.type == "cpu":
        tokens = min(tokens, CPU_BATCH_TOKENS)
    most = min(max(tokens // config.context, 1), config.unit_sequences)
    return -(-config.unit_sequences // -(-config.unit_sequences // most))


def forward(
    engine: Engine,
    hooks: Sequence[str],
    *,
    sequences: Sequences,
    batch: int,
    progress: Callable[[int], None] = lambda _: None,
) -> UnitStates:
    """The activations at `hooks`, `batch` sequences at a time; `progress` gets the positions of each batch.

    From a GPU they are copied on separate streams into page-locked memory while the next batch runs.
    """
    began = time.monotonic()
    tokens = torch.as_tensor(sequences.tokens)
    buffers = _HostBuffers(len(tokens))
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        captured = engine.capture(part.to(engine.device, non_blocking=True), hooks)
        buffers.take(start, captured)
        progress(part.numel())
    buffers.wait_forward()
    forwarded = time.monotonic()
    states = buffers.wait_copies()
    return UnitStates(states, forwarded - began, time.monotonic() - forwarded)


def to_rows(
    engine: Engine,
    states: dict[str, Float[Tensor, "sequences context width"]],
    *,
    sequences: Sequences,
    config: HarvestConfig,
) -> UnitRows:
    """The rows of the positions that the policy keeps; UserError when too many are not finite or outliers."""
    tokens = torch.as_tensor(sequences.tokens)
    opened_by = None if sequences.conversations else separator(engine.tokenizer)
    candidates = eligible(tokens, config.rows, opened_by) & torch.as_tensor(sequences.counted)
    kept = row_mask(states, candidates, config.rows)
    _check(kept, int(candidates.sum()), engine=engine, hooks=list(states), config=config)
    mask = kept.mask.numpy()
    return UnitRows(
        states={hook: take_rows(x, kept.mask) for hook, x in states.items()},
        doc=sequences.doc[mask],
        pos=sequences.pos[mask],
        token=sequences.tokens[mask],
        positions=tokens.numel(),
        nonfinite=kept.nonfinite,
        outliers=kept.outliers,
    )


def _check(kept: RowMask, candidates: int, *, engine: Engine, hooks: list[str], config: HarvestConfig) -> None:
    where = f"positions of {engine.name} in {engine.dtype} at {', '.join(hooks)}"
    if kept.nonfinite > config.max_nonfinite_fraction * candidates:
        raise UserError(
            f"{kept.nonfinite} of {candidates} {where} are NaN or Inf, more than "
            f"harvest.max_nonfinite_fraction={config.max_nonfinite_fraction}; load it in float32 (model.dtype=float32) "
            "or raise the fraction"
        )
    if kept.outliers > config.max_outlier_fraction * candidates:
        raise UserError(
            f"{kept.outliers} of {candidates} {where} are longer than harvest.rows.max_norm_ratio="
            f"{config.rows.max_norm_ratio} times the median, more than harvest.max_outlier_fraction="
            f"{config.max_outlier_fraction}; raise the ratio, or the fraction where the model is like that"
        )
    if not bool(kept.mask.any()):
        raise UserError(
            f"none of {kept.mask.numel()} positions becomes a row ({candidates} may by harvest.rows and text.turns); "
            "the text is nothing but separators, harvest.rows drops too much, or a unit of harvest.unit_sequences="
            f"{config.unit_sequences} has none of the assistant's tokens"
        )


class _HostBuffers:
    """A unit's activations in host memory: one tensor for each hook point, filled batch by batch."""

    def __init__(self, n_sequences: int) -> None:
        self._n = n_sequences
        self._states: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copies: deque[list[torch.cuda.Event]] = deque()

    def take(self, start: int, captured: dict[str, Float[Tensor, "batch context width"]]) -> None:
        """Starts to copy the activations of the sequences from `start` on; on a CPU it copies at once."""
        events = []
        for hook, x in captured.items():
            room = self._room(hook, x)[start : start + len(x)]
            if not x.is_cuda:
                room.copy_(x)
                continue
            stream = self._streams.setdefault(x.device, torch.cuda.Stream(x.device))
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                room.copy_(x, non_blocking=True)
                events.append(stream.record_event())
            x.record_stream(stream)
        self._copies.append(events)
        while len(self._copies) > COPIES_IN_FLIGHT:  # bounds activations on the device when copies are the slower part
            for event in self._copies.popleft():
                event.synchronize()

    def wait_forward(self) -> None:
        for device in self._streams:
            torch.cuda.current_stream(device).synchronize()

    def wait_copies(self) -> dict[str, Tensor]:
        for stream in self._streams.values():
            stream.synchronize()
        return self._states

    def _room(self, hook: str, x: Tensor) -> Tensor:
        if hook not in self._states:
            self._states[hook] = torch.empty(self._n, *x.shape[1:], dtype=x.dtype, pin_memory=x.is_cuda)
        return self._states[hook]
