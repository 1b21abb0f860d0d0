"""Who goes on from a rung."""

import pytest

from sae_dist.config import UserError, load
from sae_dist.sweep.halving import HalvingConfig, best


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.01, "c"), (0.34, "cab"), (0.5, "cab"), (0.51, "cabd"), (0.99, "cabdfe")]
)
def test_the_share_with_the_lowest_fvu_goes_on(keep, expected):
    fvu = {"a": 0.2, "b": 0.2, "c": 0.1, "d": 0.5, "e": None, "f": 1.5}
    assert "".join(best(fvu, keep)) == expected


def test_rungs_are_shares_of_the_steps_and_shorter_than_all_of_them():
    halving = load(HalvingConfig, {"rungs": [0.001, 0.1, 0.102, 0.5, 0.999]})
    assert halving.steps(100) == [1, 10, 11, 50]
    assert HalvingConfig().steps(100) == []
    assert halving.steps(1) == []


@pytest.mark.parametrize("rungs", [[0.3, 0.1], [0.1, 0.1], [1.0], [0.0]])
def test_rungs_that_do_not_rise_within_the_training_are_refused(rungs):
    with pytest.raises(UserError, match="rungs"):
        load(HalvingConfig, {"rungs": rungs})
