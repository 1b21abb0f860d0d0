"""What a search asks for is a function of what was tried."""

import pytest

from sae_dist.cli import grid
from sae_dist.service.config import TrainJob
from sae_dist.sweep.search import Interval, SearchConfig, Tried, ask

SPACE = {
    "sae.k": ("16", "32", "64"),
    "train.lr": Interval(1e-4, 1e-2, True, False),
    "seed": Interval(0, 9, False, True),
}


def test_what_is_asked_lies_in_the_space_and_is_the_same_again():
    config = SearchConfig(trials=5, at_once=4)
    asked = ask(SPACE, [], config)
    assert asked == ask(SPACE, [], config) and len(asked) == 4
    for point in asked:
        assert point["sae.k"] in SPACE["sae.k"] and 1e-4 <= point["train.lr"] <= 1e-2 and point["seed"] in range(10)
    tried = [Tried(point, 0.1 * number) for number, point in enumerate(asked)]
    (last,) = ask(SPACE, tried, config)  # as many as are left
    assert last not in asked
    assert ask(SPACE, [*tried, Tried(last, None)], config) == []


def test_a_space_that_was_tried_through_asks_for_nothing():
    space = {"sae.k": ("16", "32")}
    found = ask(space, [], SearchConfig(trials=50, at_once=8))
    assert sorted(point["sae.k"] for point in found) == ["16", "32"]
    assert ask(space, [Tried(point, 0.5) for point in found], SearchConfig(trials=50, at_once=8)) == []


def test_it_looks_where_it_was_good():
    space, tried = {"x": Interval(0.0, 1.0, False, False)}, list[Tried]()
    for _ in range(5):
        asked = ask(space, tried, SearchConfig(trials=40, at_once=8))
        tried += [Tried(point, abs(point["x"] - 0.7)) for point in asked]
    assert sum(each.fvu or 0 for each in tried[-16:]) < sum(each.fvu or 0 for each in tried[:16])


@pytest.mark.parametrize(
    ("override", "interval"),
    [
        ("train.lr=interval(0.001,1)", Interval(0.001, 1.0, False, False)),
        ("sae.k=int(interval(8,64))", Interval(8, 64, False, True)),
        ("train.lr=tag(log,interval(1e-4,1e-2))", Interval(1e-4, 1e-2, True, False)),
    ],
)
def test_intervals_are_hydras(override, interval):
    (axis,) = grid.read([override], TrainJob, searched=True).axes
    assert axis.interval == interval
    assert axis.within(interval.low) == interval.low and axis.within(interval.high * 2) is None
    assert axis.within("x") is None
