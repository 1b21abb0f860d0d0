"""The order is a permutation of the rows, a pure function, and the same however many ranks share it."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_dist.shards import order, permutation
from sae_dist.shards.order import OrderConfig


def test_mix64_is_the_published_splitmix64():
    # the first outputs of splitmix64 with seed 1234567, as printed by the authors' C code
    state = np.uint64(1234567)
    outputs = []
    with np.errstate(over="ignore"):
        for _ in range(3):
            outputs.append(int(permutation.mix64(np.array([state]))[0]))
            state = np.uint64((int(state) + 0x9E3779B97F4A7C15) & permutation.MASK)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(n=st.integers(0, 500), seed=st.integers(0, 2**63))
def test_a_keyed_permutation_is_one(n: int, seed: int):
    assert sorted(permutation.permutation(n, permutation.key(seed))) == list(range(n))


def test_a_keyed_permutation_never_changes():
    """Runs resume on other machines and other numpys; the oracle is plain integers."""

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    key = mix(mix(mix(1) ^ 2) ^ 3)
    assert permutation.key(1, 2, 3) == key
    for n, bits in ((1, 0), (2, 1), (50, 6), (64, 6), (65, 7)):
        words = sorted(mix(i ^ key) >> bits << bits | i for i in range(n))
        assert permutation.permutation(n, key).tolist() == [word % 2**bits for word in words]


@settings(max_examples=200)
@given(lane_rows=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_apportionment_is_exact_house_monotone_and_near_proportional(lane_rows: list[int]):
    total = sum(lane_rows)
    before = [0] * len(lane_rows)
    for taken in range(total + 1):
        given_ = order.apportion(taken, lane_rows)
        assert sum(given_) == taken
        assert all(a <= b <= n for a, b, n in zip(before, given_, lane_rows, strict=True))
        before = given_
    assert before == lane_rows


@given(lane_rows=st.lists(st.integers(1, 10**9), min_size=1, max_size=64), share=st.fractions(0, 1))
def test_apportionment_is_the_first_rows_by_due_time(lane_rows: list[int], share: Fraction):
    taken = int(share * sum(lane_rows))
    given_ = order.apportion(taken, lane_rows)
    last = (
        max((Fraction(2 * (g - 1) + 1, n), i) for i, (g, n) in enumerate(zip(given_, lane_rows, strict=True)) if g)
        if taken
        else None
    )
    nxt = [(Fraction(2 * g + 1, n), i) for i, (g, n) in enumerate(zip(given_, lane_rows, strict=True)) if g < n]
    assert sum(given_) == taken
    assert last is None or not nxt or last < min(nxt)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any),
    slice_rows=st.integers(1, 20),
    lanes=st.integers(1, 7),
    window=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_a_round_serves_every_row_exactly_once(rows: list[int], slice_rows: int, lanes: int, window: int, seed: int):
    config = OrderConfig(lanes=lanes, window=window)
    counts = np.array(rows)
    dealt = order.deal(config, seed, 0, 0, units=np.arange(len(rows)), rows=counts, slice_rows=slice_rows)
    assert dealt.rows == sum(rows) == sum(lane.rows for lane in dealt.lanes)
    seen = []
    for number, lane in enumerate(dealt.lanes):
        at = 0
        while at < lane.rows:
            w = order.window_at(config, lane, at)
            start, stop = order.window_rows(config, lane, w)
            assert start == at
            for piece in order.rows_by_slice(lane, np.sort(order.window_permutation(config, seed, dealt, number, w))):
                seen += [(piece.unit, piece.slice * slice_rows + int(r)) for r in piece.rows]
            at = stop
    assert sorted(seen) == [(u, r) for u, n in enumerate(rows) for r in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    per_round=st.integers(0, 4),
    row=st.integers(0, 600),
    seed=st.integers(0, 2**40),
)
def test_locating_a_row_agrees_with_walking_there(rows: list[int], per_round: int, row: int, seed: int):
    config, counts = OrderConfig(round_units=per_round), np.array(rows)
    place = order.locate(row, config, seed, len(rows), lambda units: counts[units])
    epoch, number, left = 0, 0, row
    while left >= (size := counts[order.round_units(config, seed, len(rows), epoch, number)].sum()):
        left -= size
        number += 1
        if number == order.n_rounds(config, len(rows)):
            epoch, number = epoch + 1, 0
    assert place == (epoch, number, left)


def test_the_first_pass_in_rounds_follows_production_and_later_ones_do_not():
    config = OrderConfig(round_units=4)
    first = np.concatenate([order.round_units(config, 5, 10, 0, i) for i in range(3)])
    second = np.concatenate([order.round_units(config, 5, 10, 1, i) for i in range(3)])
    assert first.tolist() == list(range(10))
    assert sorted(second) == list(range(10)) and second.tolist() != first.tolist()


def test_folds_of_parts_add_to_the_fold_of_the_whole_and_depend_on_the_step():
    unit, row = np.arange(10) % 3, np.arange(10) * 7
    parts = order.fold(4, unit[:6], row[:6]) + order.fold(4, unit[6:], row[6:])
    assert parts % 2**64 == order.fold(4, unit[::-1], row[::-1])
    assert order.fold(4, unit, row) != order.fold(5, unit, row)
    assert order.fold(4, np.array([1]), np.array([0])) != order.fold(4, np.array([0]), np.array([1]))


@pytest.mark.parametrize("lanes", [1, 2, 24, 240])
def test_no_lane_runs_dry_before_another(lanes: int):
    """Every batch of a round takes from each lane its share, to one row."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(500, 1500, lanes).tolist()
    total = sum(sizes)
    batch = 1000
    for taken in range(0, total - batch, batch):
        before, after = order.apportion(taken, sizes), order.apportion(taken + batch, sizes)
        for a, b, n in zip(before, after, sizes, strict=True):
            assert abs((b - a) - batch * n / total) <= 2
