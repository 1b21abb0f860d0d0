"""Rates, shares and who is slow, by numbers worked by hand."""

import pytest

from sae_dist.harvest.harvester import UnitReport
from sae_dist.service.throughput import Throughput, remaining_s, slow_process, slow_replica


def report(unit: int, *, positions: int = 100, flop: float = 1e3, duplicate: bool = False) -> UnitReport:
    return UnitReport(
        unit, positions, rows=90, outliers=2, nonfinite=1, duplicate=duplicate, gather_s=0.1, forward_s=1.0, copy_s=0.0,
        write_s=0.5, blocked_s=0.2, flop=flop,
    )  # fmt: skip


def worked(*times: float, flop_per_s: float = 1e3) -> Throughput:
    done = Throughput(0.0, flop_per_s)
    for unit, time in enumerate(times):
        done.add(report(unit), time)
    return done


def test_a_replica_tells_its_rate_its_utilisation_and_the_shares_of_its_time():
    facts = worked(2.0, 4.0).facts()
    assert facts["units"] == 2
    assert facts["tokens_per_second"] == 50  # 200 positions in 4 s
    assert facts["utilisation"] == 0.5  # 2,000 operations of 4,000
    assert facts["forward"] == pytest.approx(0.5)
    assert facts["write"] == pytest.approx(0.25)
    assert facts["blocked"] == pytest.approx(0.1)
    assert facts["tokenise"] == pytest.approx(0.05)


def test_the_rate_is_that_of_its_last_units():
    slow_then_fast = worked(100.0, *(100.0 + n for n in range(1, 9)))
    assert slow_then_fast.tokens_per_second == 100
    assert slow_then_fast.positions == 900
    assert Throughput(0.0, 1e3).tokens_per_second == 0


def test_what_is_left_takes_as_long_as_all_replicas_together_need():
    assert remaining_s([worked(2.0, 4.0), worked(1.0, 2.0)], units_left=30) == pytest.approx(30 * 100 / 150)
    assert remaining_s([Throughput(0.0, 1.0)], units_left=3) is None


def test_a_replica_below_half_of_the_others_is_named():
    fast, slow = worked(1.0, 2.0), worked(2.5, 5.0)
    assert slow_replica({0: fast, 4: slow, 7: fast}) == 4
    assert slow_replica({0: fast, 4: worked(1.8, 3.6)}) is None
    assert slow_replica({0: fast, 4: worked(30.0)}) is None  # one unit says nothing


def test_a_process_that_answers_much_later_than_the_others_is_named():
    assert slow_process({(0, 0): 0.1, (0, 1): 2.0, (3, 0): 0.2}) == (0, 1)
    assert slow_process({(0, 0): 0.1, (0, 1): 0.9}) is None  # not long
    assert slow_process({(0, 0): 1.0, (0, 1): 2.0}) is None  # all are: the machine is busy
