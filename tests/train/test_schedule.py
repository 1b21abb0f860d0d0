"""The learning rate, worked by hand."""

import pytest

from sae_dist.train.config import TrainConfig
from sae_dist.train.schedule import base_lr, lr_factor


def test_the_law_halves_the_rate_for_four_times_the_latents():
    assert base_lr(2**14, 50_000) == pytest.approx(2e-4)
    assert base_lr(2**16, 50_000) == pytest.approx(1e-4)
    assert base_lr(2**12, 50_000) == pytest.approx(4e-4)


def test_the_rate_of_short_runs_is_higher_within_bounds():
    assert base_lr(2**14, 10**6) == base_lr(2**14, 50_000)
    assert base_lr(2**14, 12_500) == pytest.approx(4e-4)
    assert base_lr(2**14, 3_125) == base_lr(2**14, 10) == pytest.approx(8e-4)
    assert base_lr(96, 100) == 5e-3


def test_warm_up_plateau_and_decay():
    config = TrainConfig(steps=20, warmup_fraction=0.2, decay_fraction=0.25)
    factors = [lr_factor(step, config) for step in range(20)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert factors[14:] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])


def test_without_warm_up_and_decay_it_is_constant():
    config = TrainConfig(steps=7, warmup_fraction=0, decay_fraction=0)
    assert {lr_factor(step, config) for step in range(7)} == {1.0}
