"""Who has which unit."""

from sae_dist.service.unit_leases import UnitLeases


def test_units_go_out_in_order_and_those_of_a_dead_replica_first():
    leases = UnitLeases(range(5), lease_s=10)
    assert [leases.grant(replica, 0.0).unit for replica in (1, 2, 1)] == [0, 1, 2]
    assert leases.take_back(1) == [0, 2]
    assert [leases.grant(2, 1.0).unit for _ in range(4)] == [0, 2, 3, 4]
    assert leases.grant(2, 1.0) is None
    assert (leases.pending, leases.leased, leases.retried) == (0, 5, 2)


def test_a_lease_lasts_as_long_as_its_replica_is_heard():
    leases = UnitLeases(range(4), lease_s=10)
    leases.grant(1, 0.0)
    leases.grant(2, 0.0)
    leases.hear(1, 9.0)
    assert leases.overdue(10.0) == []
    assert leases.overdue(10.5) == [2]
    assert leases.overdue(19.5) == [1, 2]
    assert leases.expired == 3


def test_a_report_after_the_lease_was_taken_away_is_known_to_be_late():
    leases = UnitLeases([7], lease_s=10)
    first = leases.grant(1, 0.0)
    leases.take_back(1)
    second = leases.grant(2, 20.0)
    assert (second.unit, second.attempt) == (7, first.attempt + 1)
    assert not leases.finish(first.attempt)
    assert leases.left == 1
    assert leases.finish(second.attempt)
    assert leases.left == 0
