"""Scaling Monosemanticity repeated: completeness where it is known, and all of it on a tiny model."""

import numpy as np
import pytest

from benchmarks.paper_2024 import completeness
from benchmarks.paper_2024.completeness import Firings
from tests.papers.repeated import twice


def test_the_best_f1_of_each_concept_is_counted_over_all_parts():
    """Concept 0 on four rows, latent 2 on three of them and one other: F1 = 2 x 3 / (4 + 4). Concept 2 has none."""
    concept = np.array([0, 0, 1, 0, 0, 1, 2])
    latent, row = np.array([2, 2, 1, 2, 1, 0, 2]), np.array([0, 1, 2, 3, 5, 0, 5])
    firings = Firings(4, 3)
    for part in (slice(0, 3), slice(3, 7)):
        own = (row >= part.start) & (row < part.stop)
        firings.add(latent[own], row[own] - part.start, concept[part])
    np.testing.assert_allclose(firings.best(), [2 * 3 / 8, 2 * 2 / 4, 0])
    assert firings.alive == 3
    np.testing.assert_array_equal(firings.rows, [4, 2, 1])


@pytest.mark.slow
def test_the_fitted_middle_is_that_of_a_planted_curve_and_its_interval_holds_it():
    inside = 0
    for seed in range(10):
        chance = np.random.default_rng(seed)
        frequency = np.exp(chance.uniform(np.log(1e-6), np.log(1e-2), 800))
        has = chance.random(800) < 1 / (1 + np.exp(-1.5 * (np.log(frequency) - np.log(1e-4))))
        curve = completeness.fit(frequency, has, resamples=30)
        assert curve is not None
        assert curve.middle == pytest.approx(1e-4, rel=0.35)
        inside += curve.low <= 1e-4 <= curve.high
    assert inside >= 8


def test_concepts_that_frequency_parts_have_their_middle_between_and_all_or_none_have_no_curve():
    frequency = np.array([1e-5, 2e-5, 4e-5, 8e-5])
    curve = completeness.fit(frequency, np.array([False, False, True, True]), resamples=10)
    assert curve is not None
    assert 2e-5 < curve.middle < 4e-5
    assert completeness.fit(frequency, np.ones(4, bool)) is None
    assert completeness.fit(frequency, np.zeros(4, bool)) is None
    assert completeness.spread([0.8, 1.0, 0.9]) == pytest.approx(0.25)


@pytest.mark.slow
def test_the_whole_paper_on_a_tiny_model(tmp_path):
    """Attribution is nearly what ablation shows through two layers; repeated, the page is the same."""
    found, page = twice("paper_2024", tmp_path / "out", "model=tiny-llama", "hook=resid_post.1", "sae.k=8")
    assert {(each["recipe"], each["width"]) for each in found["dictionaries"]} == {
        (recipe, width) for recipe in ("relu_norm", "jumprelu") for width in (32, 128, 512)
    }
    assert found["attribution"]["attribution"]["mean"] >= 0.8
    assert {line["law"] for line in found["laws"]} >= {"L(C)"}
    assert (tmp_path / "out/relu_norm/report/index.html").exists()
    assert "0.12" in page
