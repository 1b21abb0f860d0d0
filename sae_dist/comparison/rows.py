"""Held-out rows of one or several stores, read side by side: the same tokens for every dictionary."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards.hooks import Hooks, widths
from sae_dist.shards.reader import Store, StoredRows, unit_rows

BATCH_ROWS = 4096
IDENTITY = ("doc", "pos", "token")  # of a row


class Place(NamedTuple):
    """Where the rows of a dictionary are."""

    store: Store
    hooks: Hooks


class Batch(NamedTuple):
    """For each dictionary what it reads and what it rebuilds, fp32, of the same tokens."""

    x: list[Tensor]  # [rows, d_in] of each
    target: list[Tensor]  # [rows, d_out] of each

    def __len__(self) -> int:
        return len(self.x[0])


class HeldoutRows:
    """The first `tokens` held-out rows, in the order stored; each iteration gives the same batches.

    Rows that are not finite for every dictionary are left out and counted.
    """

    def __init__(self, places: Sequence[Place], tokens: int) -> None:
        """UserError where a store has no held-out rows."""
        self._places, self._tokens, self.left_out = places, tokens, 0
        self._stores = {place.store.storage.uri: place.store for place in places}
        for uri, store in self._stores.items():
            if not _count(store):
                raise UserError(f"store={uri} has no held-out rows to compare on; import it with heldout_fraction")

    @property
    def batches(self) -> int:
        """How many there will be."""
        return -(-min(self._tokens, *map(_count, self._stores.values())) // BATCH_ROWS)

    def __iter__(self) -> Iterator[Batch]:
        """UserError where the stores do not hold the same tokens in the same order."""
        self.left_out, seen = 0, 0
        hooks = {uri: self._hooks_of(uri) for uri in self._stores}
        streams = [_batches(store, hooks[uri]) for uri, store in self._stores.items()]
        for parts in itertools.zip_longest(*streams):
            of_stores = dict(zip(self._stores, parts, strict=True))
            n = _same_tokens(of_stores, seen, at_most=self._tokens - seen)
            seen += n
            batch = self._batch({uri: self._columns(uri, part.x[:n], hooks[uri]) for uri, part in of_stores.items()})
            if len(batch):
                yield batch
            if seen == self._tokens:
                return

    def _hooks_of(self, uri: str) -> tuple[str, ...]:
        """The hook points that dictionaries take from a store, each once."""
        own = (place.hooks.every for place in self._places if place.store.storage.uri == uri)
        return tuple(dict.fromkeys(itertools.chain.from_iterable(own)))

    def _columns(self, uri: str, x: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        each = x.split(list(widths(self._stores[uri].meta, hooks).values()), dim=1)
        return dict(zip(hooks, each, strict=True))

    def _batch(self, columns: dict[str, dict[str, Tensor]]) -> Batch:
        def side(place: Place, names: Sequence[str]) -> Tensor:
            own = columns[place.store.storage.uri]
            return torch.cat([own[name] for name in names], 1).float()

        x = [side(place, place.hooks.sides[0]) for place in self._places]
        target = [side(place, place.hooks.sides[-1]) for place in self._places]
        finite = torch.stack([rows.isfinite().all(1) for rows in x + target]).all(0)
        self.left_out += int((~finite).sum())
        return Batch([rows[finite] for rows in x], [rows[finite] for rows in target])


def _count(store: Store) -> int:
    commits = (store.commit(unit) for unit in range(store.meta.train_units, store.meta.n_units))
    return sum(commit.rows for commit in commits if commit is not None)


def _batches(store: Store, hooks: Sequence[str]) -> Iterator[StoredRows]:
    """Held-out rows, `BATCH_ROWS` at a time whatever units and slices they lie in; the last batch may be smaller."""
    kept, have = list[StoredRows](), 0
    for unit in range(store.meta.train_units, store.meta.n_units):
        for part in unit_rows(store, hooks, unit, BATCH_ROWS):
            kept.append(part)
            have += len(part.x)
            if have >= BATCH_ROWS:
                whole = _joined(kept)
                yield _cut(whole, slice(BATCH_ROWS))
                kept, have = [_cut(whole, slice(BATCH_ROWS, None))], have - BATCH_ROWS
    if have:
        yield _joined(kept)


def _joined(parts: Sequence[StoredRows]) -> StoredRows:
    if len(parts) == 1:
        return parts[0]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in IDENTITY}
    return StoredRows(torch.cat([part.x for part in parts]), **columns, unit=parts[-1].unit)


def _cut(rows: StoredRows, at: slice) -> StoredRows:
    return StoredRows(rows.x[at], rows.doc[at], rows.pos[at], rows.token[at], rows.unit)


def _same_tokens(of_stores: dict[str, StoredRows | None], seen: int, *, at_most: int) -> int:
    """How many rows of these batches to take; UserError with the first place where they are not of the same tokens."""
    (first, rows), *others = of_stores.items()
    for other, theirs in others:
        n = min(at_most, *(0 if part is None else len(part.x) for part in (rows, theirs)))
        if rows is not None and theirs is not None:
            unlike = [getattr(rows, name)[:n] != getattr(theirs, name)[:n] for name in IDENTITY]
            if (at := np.flatnonzero(np.any(unlike, axis=0))).size:
                where = " and ".join(f"{_token(part, at[0])} in {uri}" for uri, part in of_stores.items() if part)
                raise UserError(f"held-out row {seen + int(at[0]):,} is {where}; {_CURE}")
        if n < at_most and (rows is None or theirs is None or len(rows.x) != len(theirs.x)):
            ends = first if rows is None or (theirs is not None and len(rows.x) < len(theirs.x)) else other
            raise UserError(f"{ends} ends after {seen + n:,} held-out rows, another store does not; {_CURE}")
    assert rows is not None
    return min(at_most, len(rows.x))


_CURE = (
    "activations are correlated on the same tokens in the same order: harvest the stores with the same text, "
    "tokenizer, context, seed and harvest.rows"
)


def _token(rows: StoredRows, at: int) -> str:
    return f"token {rows.token[at]} at position {rows.pos[at]} of document {rows.doc[at]}"
