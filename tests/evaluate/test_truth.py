"""The judge of known worlds, on dictionaries whose figures are known."""

import pytest
import torch

from benchmarks.truth import judge
from benchmarks.worlds import World, hierarchical, independent, world
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters

N = 24


def made(directions: torch.Tensor, *, gain: float = 1.0) -> Dictionary:
    """Rows are the directions themselves; a latent is active above 0.25."""
    parameters = Parameters(gain * directions.T, directions, torch.zeros(len(directions)), torch.zeros(N))
    theta = torch.full((len(directions),), 0.25 * gain)
    return Dictionary(parameters=parameters, k=4, info={"variant": "batchtopk"}, threshold=theta)


@pytest.mark.parametrize("name", ["independent", "hierarchy"])
def test_a_dictionary_of_the_very_features_is_perfect_and_half_of_it_finds_half(name):
    of_hierarchy = name == "hierarchy"
    children = {p: list(range(3 + 7 * p, 10 + 7 * p)) for p in range(3)} if of_hierarchy else {}
    activity = hierarchical(3, 7) if of_hierarchy else independent(torch.full((N,), 1 / 6))
    known = World(name, torch.eye(N), activity, children)
    rows = known.rows(4000, seed=1)
    whole = judge(made(known.directions), known, rows)
    assert (whole.mmcs, whole.recovered, whole.dead) == (1, 1, 0)
    assert whole.f1 == pytest.approx(1) and whole.mcc == pytest.approx(1) and whole.shrinkage == pytest.approx(1)
    assert whole.fvu < 1e-9 and whole.absorption == (0 if of_hierarchy else None)
    assert whole.l0 == pytest.approx(4, rel=0.1)
    half = judge(made(known.directions[: N // 2]), World(name, known.directions, activity, {}), rows)
    assert half.recovered == 0.5 and half.mmcs == pytest.approx(0.5)


def test_shrunk_values_are_seen_and_refitting_undoes_them():
    known = World("independent", torch.eye(N), independent(torch.full((N,), 1 / 6)), {})
    shrunk = judge(made(known.directions, gain=0.5), known, known.rows(1000, seed=1))
    assert shrunk.shrinkage == pytest.approx(0.5) and shrunk.fvu > 0.2 and shrunk.fvu_refitted < 1e-9


def test_the_worlds_have_as_many_active_features_as_they_say():
    for name in ("independent", "correlated", "hierarchy", "zipf", "nuisance"):
        rows = world(name).rows(8000, seed=0)
        assert float((rows.strength > 0).double().sum(1).mean()) == pytest.approx(4, rel=0.08), name
        assert rows.x.shape == (8000, 64)
