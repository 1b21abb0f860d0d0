"""Which sequences of the corpus make up each unit; fixed before the harvest starts."""

from typing import NamedTuple

import numpy as np

from sae_dist.harvest.config import HarvestConfig
from sae_dist.shards.permutation import key, permutation

_UNITS = 0x756E697473  # "units": makes this permutation differ from others of the same seed


class UnitSequences(NamedTuple):
    """One unit of work: sequences of one of the two token streams."""

    unit: int
    heldout: bool
    sequences: np.ndarray  # int64 [n], ids in the stream


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
    n_sequences = (n_heldout if heldout else n_train) * config.unit_sequences
    first = (unit - n_train if heldout else unit) * config.unit_sequences
    order = np.arange(n_sequences) if heldout else permutation(n_sequences, key(config.seed, _UNITS))
    return UnitSequences(unit, heldout, order[first : first + config.unit_sequences])
