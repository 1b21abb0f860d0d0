"""Rates from measured steps."""

import numpy as np
import pytest

from sae_dist.plan.fit import TimedStep, nonnegative, rates
from sae_dist.plan.probe import SHAPES
from sae_dist.plan.seconds import amounts
from sae_dist.plan.workload import Workload
from sae_dist.sae.config import TopK


def work(n_latents, d_model, k, batch):
    return Workload(sae=TopK(n_latents=n_latents, k=k, k_aux=0), d_model=d_model, batch=batch)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_rates_that_made_the_times_are_found_again_from_the_probes_shapes(backend):
    """So the shapes tell the five kinds of work apart."""
    true = {"product": 1e-11, "select": 2e-10, "gather": 1e-10, "stream": 3e-11, "step": 4e-4}
    steps = [
        TimedStep(work(*shape), sum(amount * true[kind] for kind, amount in amounts(work(*shape), backend).items()))
        for shape in SHAPES
    ]
    found = rates(steps, backend)
    assert 1 / found.product == pytest.approx(true["product"], rel=1e-6)
    assert found.select is not None
    assert 1 / found.select == pytest.approx(true["select"], rel=1e-6)
    assert 1 / found.gather == pytest.approx(true["gather"], rel=1e-6)
    assert 1 / found.stream == pytest.approx(true["stream"], rel=1e-6)
    assert found.step_s == pytest.approx(true["step"], rel=1e-6)


def test_nonnegative_least_squares_meets_its_optimality_conditions():
    """Karush-Kuhn-Tucker: the gradient is zero where x > 0 and not negative where x = 0."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.normal(size=(8, 5)), generator.normal(size=8)
        x = nonnegative(a, b)
        gradient = a.T @ (a @ x - b)
        assert (x >= 0).all()
        assert np.abs(gradient[x > 0]).max(initial=0) < 1e-9
        assert gradient[x == 0].min(initial=0) > -1e-9
