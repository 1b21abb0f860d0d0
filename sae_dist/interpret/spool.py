"""Activations of a stream on disk, sorted by latent: those of any few latents are read without the others.

    PART/doc.npy, pos.npy               int64 [rows]: of every row
    PART/latent.npy, row.npy, value.npy int32, int32, float32 [n]: the activations, by latent, then by row of the part

A part is complete or absent, so spooling goes on after its last one.
"""

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sae_kernels import Active
from torch import Tensor

from sae_dist.interpret.collect import Encode, RowBatches, active_entries, first_tokens

PART_ROWS = 1 << 16  # a part ends with the batch that brings it to so many rows
COMPLETE = "complete"  # an empty file beside the parts, once all are there


class Part(NamedTuple):
    """The columns of a part, mapped into memory."""

    doc: np.ndarray
    pos: np.ndarray
    latent: np.ndarray
    row: np.ndarray
    value: np.ndarray


def spool(folder: Path, rows: RowBatches, encode: Encode, *, tokens: int) -> list[Part]:
    """Encodes the first `tokens` rows of a stream and keeps every activation; repeated, it goes on where it stopped.

    The stream must be the same, in the same batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = list(itertools.takewhile(lambda part: part.is_dir(), (folder / f"{i:06d}" for i in itertools.count())))
    if not (folder / COMPLETE).exists():
        known = sum(len(_column(part, "doc")) for part in done)
        for number, columns in enumerate(_parts(_beyond(first_tokens(rows, tokens), known), encode), len(done)):
            done.append(folder / f"{number:06d}")
            _write(done[-1], columns)
        (folder / COMPLETE).touch()
    return [Part(*(_column(part, name) for name in Part._fields)) for part in done]


def of_latents(parts: Sequence[Part], first: int, last: int) -> RowBatches:
    """The rows on which latents from `first` to before `last` are active, for `encode`: a batch a part.

    x [rows, 2 n]: the values of the at most n that are active on a row, 0 where there are fewer, and their latents less
    `first`.
    """
    for part in parts:
        low, high = np.searchsorted(part.latent, [first, last])
        if low == high:
            continue
        order = np.argsort(part.row[low:high], kind="stable")
        shown, place, counts = np.unique(part.row[low:high][order], return_inverse=True, return_counts=True)
        rank = np.arange(high - low) - (np.cumsum(counts) - counts)[place]
        values, latents = np.zeros((2, len(shown), counts.max()), np.float32)
        values[place, rank] = part.value[low:high][order]
        latents[place, rank] = part.latent[low:high][order] - first
        yield torch.from_numpy(np.concatenate([values, latents], 1)), part.doc[shown], part.pos[shown]


def encode(x: Float[Tensor, "rows two_n"]) -> Active:
    """What `of_latents` has put into x."""
    values, latents = x.chunk(2, dim=1)
    row, at = (values > 0).nonzero(as_tuple=True)
    offsets = torch.nn.functional.pad(row.bincount(minlength=len(x)).cumsum(0), (1, 0))
    return Active(values[row, at], latents[row, at].long(), offsets)


def _beyond(batches: Iterator[tuple[Tensor, Tensor, Tensor]], known: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches after the first `known` rows, which end with a batch."""
    for x, doc, pos in batches:
        if known >= len(x):
            known -= len(x)
        else:
            yield x, doc, pos


def _parts(batches: Iterator[tuple[Tensor, Tensor, Tensor]], encode: Encode) -> Iterator[Part]:
    """The columns of every part that is to be written."""
    kept: list[list[Tensor]] = []
    rows = 0
    for x, doc, pos in batches:
        row, latent, value = active_entries(encode, x)
        kept.append([doc, pos, latent.int(), (row + rows).int(), value])
        rows += len(doc)
        if rows >= PART_ROWS:
            yield _sorted(kept)
            kept, rows = [], 0
    if kept:
        yield _sorted(kept)


def _sorted(batches: Sequence[Sequence[Tensor]]) -> Part:
    doc, pos, latent, row, value = (torch.cat(column).numpy() for column in zip(*batches, strict=True))
    order = np.argsort(latent, kind="stable")
    return Part(doc, pos, latent[order], row[order], value[order])


def _write(part: Path, columns: Part) -> None:
    partial = part.with_name(f"{part.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, column in columns._asdict().items():
        np.save(partial / f"{name}.npy", column)
    os.rename(partial, part)


def _column(part: Path, name: str) -> np.ndarray:
    return np.load(part / f"{name}.npy", mmap_mode="r")
