"""Which sequences of the corpus make up each unit; fixed before the harvest starts."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

from sae_dist.harvest.config import HarvestConfig
from sae_dist.shards.permutation import key, permutation

_UNITS = 0x756E697473  # "units": makes this permutation differ from others of the same seed


class UnitSequences(NamedTuple):
    """One unit of work: sequences of one of the two token streams."""

    unit: int
    heldout: bool
    sequences: Int64[np.ndarray, " n"]  # ids in the stream


def unit_counts(config: HarvestConfig) -> tuple[int, int]:
    """(training units, held-out units): whole units, enough for the tokens asked for."""
    per_unit = config.unit_sequences * config.context
    return -(-config.tokens // per_unit), -(-config.heldout_tokens // per_unit)


def sequences_of(unit: int, config: HarvestConfig) -> UnitSequences:
    """The sequences of unit `unit`; held-out units come last.

    Training sequences are assigned to units by a keyed permutation: every unit is a random sample of the text, so a
    store can be consumed in the order in which it grows.
    """
    n_train, n_heldout = unit_counts(config)
    assert 0 <= unit < n_train + n_heldout
    heldout = unit >= n_train
    first = (unit - n_train if heldout else unit) * config.unit_sequences
    last = first + config.unit_sequences
    ids = np.arange(first, last) if heldout else _train_order(n_train * config.unit_sequences, config.seed)[first:last]
    return UnitSequences(unit, heldout, ids.astype(np.int64))


@functools.lru_cache(maxsize=1)
def _train_order(n: int, seed: int) -> UInt32[np.ndarray, " n"] | Int64[np.ndarray, " n"]:
    """All training sequences in the order of the units.

    Kept: a billion tokens take up to a second to permute, and every unit would wait for it. 32 bits halve the memory.
    """
    order = permutation(n, key(seed, _UNITS))
    return order.astype(np.uint32) if n <= 1 << 32 else order
