"""How many replicas: decided by who waits, slowly, and told when there is no room."""

import pytest

from sae_dist.service.autoscaling import PATIENCE, SETTLING, Observation, ScaleState, decide
from sae_dist.service.placement import Bundle, Node, explain, never_fits

STARVING, BLOCKED, CONTENT = Observation(0.5, 0.0), Observation(0.0, 0.6), Observation(0.0, 0.1)


def after(scale: ScaleState, *seen: Observation, least: int = 1, most: int = 4, starting: bool = False) -> ScaleState:
    for each in seen:
        scale = decide(scale, each, least=least, most=most, starting=starting)
    return scale


def test_starving_consumers_get_replicas_and_blocked_producers_lose_them_one_at_a_time():
    assert after(ScaleState(2), *[STARVING] * PATIENCE).wanted == 3
    assert after(ScaleState(2), *[BLOCKED] * PATIENCE).wanted == 1
    assert after(ScaleState(2), *[STARVING] * (PATIENCE + SETTLING + PATIENCE - 1)).wanted == 3
    assert after(ScaleState(2), *[STARVING] * (PATIENCE + SETTLING + PATIENCE)).wanted == 4


def test_what_does_not_last_changes_nothing():
    assert after(ScaleState(2), *[STARVING] * (PATIENCE - 1), CONTENT, *[STARVING] * (PATIENCE - 1)).wanted == 2
    assert after(ScaleState(2), *[STARVING, BLOCKED] * 10).wanted == 2
    assert (
        after(ScaleState(2), *[Observation(0.5, 0.1)] * 20).wanted == 2
    )  # who starves beside a full store lacks no producer


def test_the_bounds_hold_and_nothing_is_decided_while_a_replica_starts():
    assert after(ScaleState(4), *[STARVING] * 50).wanted == 4
    assert after(ScaleState(1), *[BLOCKED] * 50).wanted == 1
    assert after(ScaleState(2), *[STARVING] * 50, starting=True).wanted == 2
    held = after(ScaleState(2), STARVING, starting=True)
    assert after(held, *[STARVING] * (SETTLING + PATIENCE - 1)).wanted == 2
    assert after(held, *[STARVING] * (SETTLING + PATIENCE)).wanted == 3


@pytest.mark.parametrize("bundle", [Bundle(1, 0), Bundle(1, 0.5), Bundle(2, 1)])
def test_a_replica_fits_when_every_process_of_it_has_a_place_on_some_node(bundle):
    nodes = [Node("a", {"CPU": 3, "GPU": 1}, {"CPU": 0}), Node("b", {"CPU": 4}, {"CPU": 4})]
    places = {Bundle(1, 0): 7, Bundle(1, 0.5): 2, Bundle(2, 1): 1}[bundle]
    assert not never_fits(bundle, places, nodes)
    assert never_fits(bundle, places + 1, nodes)


def test_what_is_waited_for_is_named():
    said = explain(Bundle(1, 1), 2, [Node("a", {"CPU": 3, "GPU": 1}, {"CPU": 2, "GPU": 0})])
    assert said == "2 x {CPU: 1, GPU: 1}, one for each of its processes; a has CPU 2, GPU 0 free of CPU 3, GPU 1"
