"""Statistics merge to those of the whole, whatever the parts."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_dist import storage
from sae_dist.shards import reader, statistics, stores
from tests.memory_storage import MemoryStorage
from tests.shards import predictable


def direct(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float, float]:
    rows = x.double()
    return (
        rows.mean(0).numpy(),
        ((rows - rows.mean(0)) ** 2).sum(0).numpy(),
        float(rows.norm(dim=1).mean()),
        float(rows.abs().max()),
    )


@given(cuts=st.lists(st.integers(1, 5000), max_size=4))
def test_parts_merge_to_the_whole(cuts: list[int]):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5001, 3, generator=generator) * torch.tensor([1.0, 50.0, 0.01]) + torch.tensor([0.0, 3000.0, -1.0])
    edges = sorted({0, *cuts, len(x)})
    got = statistics.merged(statistics.measure(x[a:b]).statistics for a, b in zip(edges, edges[1:], strict=False))
    mean, M2, norm, largest = direct(x)
    assert got.n == len(x) and got.nonfinite == 0
    np.testing.assert_allclose(got.mean, mean, rtol=1e-5, atol=1e-4)  # fp32 sums of up to 2,048 rows
    np.testing.assert_allclose(got.M2, M2, rtol=1e-4)
    assert got.norm_mean == pytest.approx(norm, rel=1e-6)
    assert got.max_abs == pytest.approx(largest, rel=1e-6)


def test_rows_that_are_not_finite_are_in_no_figure_but_their_count():
    x = torch.ones(6, 2)
    x[1, 0], x[4, 1] = torch.nan, torch.inf
    got, finite = statistics.measure(x)
    assert (got.n, got.nonfinite, got.mean.tolist(), got.max_abs) == (4, 2, [1.0, 1.0], 1.0)
    assert finite.tolist() == [True, False, True, True, False, True]
    bad = statistics.measure(x[1:2]).statistics
    assert bad.n == 0 and statistics.merge(bad, got)[0::5] == (4, 3)


def test_the_store_merges_the_first_training_units(tmp_path):
    store = predictable.filled(storage.open(tmp_path))
    rows = [predictable.rows_of(unit, 96 - 7 * unit) for unit in range(3)]
    x = torch.cat([predictable.activation(r["doc"], r["pos"], 2) for r in rows])
    got = store.statistics("resid_post.2", 3)
    mean, M2, norm, _ = direct(x)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.M2, M2, rtol=1e-5)
    assert got.norm_mean == pytest.approx(norm, rel=1e-6)
    assert store.statistics("resid_post.2").n == sum(96 - 7 * u for u in range(5))  # the held-out unit is not in it


class Distant(MemoryStorage):
    """A storage that takes a while to answer; counts how many commits are read at once, and since `reset` in all."""

    def __init__(self, name: str):
        super().__init__(name)
        self._counting = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.reading, self.most, self.reads = 0, 0, 0

    def read(self, key, start=None, length=None):
        if not key.startswith("commit/"):
            return super().read(key, start, length)
        with self._counting:
            self.reads += 1
            self.reading += 1
            self.most = max(self.most, self.reading)
        time.sleep(0.01)
        try:
            return super().read(key, start, length)
        finally:
            with self._counting:
                self.reading -= 1


def test_units_are_read_side_by_side_a_block_at_a_time_and_merged_as_one_by_one(monkeypatch):
    monkeypatch.setattr(reader, "UNITS_AT_ONCE", 5)
    place = Distant("distant")
    predictable.filled(place, n_units=13)
    place.delete("commit/00000007.json")  # not harvested yet
    store, hook = stores.open(place), "resid_post.2"
    one_by_one = [store.unit_statistics(unit, hook) for unit in range(12)]
    place.reset()
    got, expected = store.statistics(hook), statistics.merged(part for part in one_by_one if part is not None)
    assert 1 < place.most <= 5 and place.reads == 12
    assert got.n == expected.n > 0
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(getattr(got, name), value)  # to the last bit
    assert store.statistics(hook, 0).n == 0
