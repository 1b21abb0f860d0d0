"""The corpus cut into units before anything is harvested."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sae_dist.harvest import units as module
from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.units import sequences_of, unit_counts
from sae_dist.shards import permutation


@given(st.integers(1, 5000), st.integers(1, 500), st.integers(2, 40), st.integers(1, 30), st.integers(0, 5))
def test_every_sequence_is_in_exactly_one_unit(tokens, heldout_tokens, context, unit_sequences, seed):
    config = HarvestConfig(
        tokens=tokens, heldout_tokens=heldout_tokens, context=context, unit_sequences=unit_sequences, seed=seed
    )
    n_train, n_heldout = unit_counts(config)
    assert (n_train - 1) * unit_sequences * context < tokens <= n_train * unit_sequences * context
    units = [sequences_of(unit, config) for unit in range(n_train + n_heldout)]
    for heldout, n in ((False, n_train), (True, n_heldout)):
        ids = np.concatenate([unit.sequences for unit in units if unit.heldout == heldout])
        assert sorted(ids.tolist()) == list(range(n * unit_sequences))


def test_a_unit_is_a_sample_of_the_whole_text_and_depends_on_the_seed():
    config = HarvestConfig(tokens=1_000_000, context=100, unit_sequences=100)
    first = sequences_of(0, config).sequences
    assert first.min() < 1000 < 9000 < first.max()
    other = sequences_of(0, HarvestConfig(tokens=1_000_000, context=100, unit_sequences=100, seed=1)).sequences
    assert set(first) != set(other)


def test_the_order_is_worked_out_once_for_all_units_and_is_that_of_every_store_before(monkeypatch):
    """A keyed permutation of all training sequences, cut into units; then the held-out ones as they lie."""
    config = HarvestConfig(tokens=10_000, heldout_tokens=1_000, context=20, unit_sequences=16, seed=7)
    n_train, n_heldout = unit_counts(config)
    order = permutation.permutation(n_train * 16, permutation.key(7, 0x756E697473))
    calls = []
    monkeypatch.setattr(module, "permutation", lambda *given: calls.append(given) or permutation.permutation(*given))
    module._train_order.cache_clear()
    for unit in range(n_train + n_heldout):
        found = sequences_of(unit, config)
        first = 16 * (unit if unit < n_train else unit - n_train)
        expected = order[first : first + 16] if unit < n_train else np.arange(first, first + 16)
        assert found.sequences.dtype == np.int64 and np.array_equal(found.sequences, expected)
    assert len(calls) == 1
