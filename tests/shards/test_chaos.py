"""The chaos run of tests/chaos.py, short and long."""

import pytest

from tests import chaos


@pytest.mark.slow
def test_ten_seconds_of_chaos_break_no_promise():
    done = chaos.run(10, seed=1)
    assert done["episodes"] >= 1 and done["steps"] == done["episodes"] * chaos.STEPS


@pytest.mark.slow
def test_sixty_seconds_of_chaos_break_no_promise():
    done = chaos.run(60, seed=2)
    assert done["producers killed"] > 0 and done["consumers killed"] > 0 and done["faults served"] > 0
