"""A law that was planted is found again within its intervals; what is no law is refused, with the reason."""

import dataclasses

import numpy as np
import pytest

from sae_dist.sweep.law import OPENAI, Fit, Refusal, fit
from sae_dist.sweep.next_point import next_point
from sae_dist.sweep.rows import row
from sae_dist.sweep.scaling import laws, predictions
from tests.sweep import planted

SIZES, KS = [2**11, 2**13, 2**15, 2**17, 2**19], [16, 32, 64, 128, 256]
SMALL, FEW = [4096, 16384, 65536], [16, 32, 64]


def rows(points):
    return [row(point) for point in points]


def why(found) -> str:
    assert isinstance(found, Refusal), found
    return found.why


def test_a_law_without_noise_is_found_exactly():
    n, k = planted.grid(SIZES, KS)
    found = fit(n, k, planted.loss(n, k), resamples=20)
    assert isinstance(found, Fit)
    for name, interval in found.parameters.items():
        assert interval.value == pytest.approx(OPENAI[name], rel=1e-3, abs=1e-3)
    assert found.at(2**21, 32).value == pytest.approx(planted.loss(np.array([2**21]), np.array([32]))[0], rel=1e-4)


def test_planted_exponents_are_within_their_intervals_in_19_of_20_seeds():
    n, k = planted.grid(SIZES, KS)
    truth, beyond = planted.exponents(n, k), planted.loss(np.array([2.0**21]), np.array([32.0]))[0]
    within, foreseen = 0, 0
    for seed in range(20):
        found = fit(n, k, planted.noisy(planted.loss(n, k), 0.01, seed), resamples=200)
        assert isinstance(found, Fit)
        within += all(found.exponents[name].low <= truth[name] <= found.exponents[name].high for name in truth)
        foreseen += found.at(2**21, 32).low <= beyond <= found.at(2**21, 32).high
        assert found.exponents["x"].high - found.exponents["x"].low < 0.15  # and say something
    assert within >= 19
    assert foreseen >= 18


def test_equal_points_give_an_equal_fit():
    n, k = planted.grid(SMALL, FEW)
    losses = planted.noisy(planted.loss(n, k), 0.003, 1)
    one, two = (fit(n, k, losses, resamples=50) for _ in range(2))
    assert isinstance(one, Fit) and isinstance(two, Fit)
    assert np.array_equal(one.samples, two.samples) and np.array_equal(one.best, two.best)


@pytest.mark.parametrize("seed", range(5))
def test_flat_data_is_refused(seed):
    n, k = planted.grid(SMALL, FEW)
    assert why(fit(n, k, planted.noisy(np.full(9, 0.3), 0.02, seed))) == "flat"


def test_data_flat_in_one_of_the_two_is_refused():
    n, k = planted.grid(SIZES, KS)
    assert why(fit(n, k, planted.noisy(k**-0.2, 0.01, 0))) == "flat"
    assert why(fit(n, k, planted.noisy(n**-0.2, 0.01, 0))) == "flat in k"
    assert why(fit(n, k, np.full(len(n), 0.25))) == "flat"


def test_too_few_points_sizes_and_too_small_a_range_are_refused():
    n, k = planted.grid([4096, 65536], KS)
    assert why(fit(n, k, planted.loss(n, k))) == "range of x"
    n, k = planted.grid([4096, 5000, 6000], KS)
    assert why(fit(n, k, planted.loss(n, k))) == "range of x"
    n, k = planted.grid(SMALL, FEW)
    assert why(fit(n[:-2], k[:-2], planted.loss(n, k)[:-2])) == "points"


def test_points_that_scatter_more_than_they_follow_a_trend_are_refused():
    n, k = planted.grid(SIZES, KS)
    drawn = np.random.default_rng(0).standard_normal(len(n)) * 0.6
    assert why(fit(n, k, planted.loss(n, k) * np.exp(drawn))) in ("noise", "flat", "flat in k")


def test_an_error_that_grows_with_size_is_refused():
    n, k = planted.grid(SMALL, FEW)
    assert why(fit(n, k, planted.noisy(n**0.1 * k**-0.2, 0.005, 0))) == "grows"


def test_a_sweep_has_a_law_of_size_and_one_of_compute():
    joint, compute = laws(rows(planted.points(SMALL, FEW)))
    assert (joint.name, compute.name) == ("L(n, k)", "L(C)")
    assert isinstance(joint.found, Fit) and isinstance(compute.found, Fit)
    assert joint.found.exponents["x"].high < 0 and compute.found.exponents["x"].high < 0
    far = predictions(joint, 262144)
    assert [one.k for one in far] == FEW and all(one.beyond == 4 for one in far)
    assert all(one.fvu.low < one.fvu.value < one.fvu.high for one in far)


def test_with_two_values_of_k_the_joint_law_is_refused_and_that_of_size_is_fitted():
    joint, alone, _ = laws(rows(planted.points(SIZES, [16, 64])))
    assert why(joint.found) == "k"
    assert alone.name == "L(n)" and isinstance(alone.found, Fit)


def test_points_of_other_keys_have_laws_of_their_own():
    points = [
        dataclasses.replace(each, overrides={**each.overrides, "sae": kind})
        for kind in ("topk", "jumprelu")
        for each in planted.points(SMALL, FEW)
    ]
    assert [(each.name, each.group, len(each.rows)) for each in laws(rows(points))] == [
        (name, f"sae={kind}", 9) for kind in ("topk", "jumprelu") for name in ("L(n, k)", "L(C)")
    ]


def test_a_search_has_one_refusal_not_one_for_each_of_its_values():
    found = laws(rows([planted.point(at, {"sae.k": 8, "train.lr": 0.001 * at}, 0.3) for at in range(1, 30)]))
    assert [why(each.found) for each in found] == ["points"]


def test_points_that_stopped_early_are_left_out_of_the_law_of_size():
    points = planted.points(SMALL, FEW)
    early = [
        dataclasses.replace(
            each, overrides={**each.overrides, "seed": 1}, summary={**(each.summary or {}), "tokens_trained": 1000}
        )
        for each in points[:4]
    ]
    joint = laws(rows([*points, *early]))[0]
    assert len(joint.rows) == 9 and any("4 points" in note for note in joint.notes)


def test_of_a_kind_that_aims_at_no_k_the_law_has_the_active_latents_that_were_measured():
    points = planted.points(SMALL, FEW)
    free = [dataclasses.replace(each, summary={**(each.summary or {}), "k": None}) for each in points]
    asked, measured = laws(rows(points))[0].found, laws(rows(free))[0].found
    assert isinstance(asked, Fit) and isinstance(measured, Fit)  # there, an L0 is 1.01 k
    assert measured.parameters["beta_k"].value == pytest.approx(asked.parameters["beta_k"].value, rel=0.02)
    assert [one.k for one in rows(free)] == [None] * 9
    for one, other in zip(rows(free), rows(points), strict=True):
        assert one.flops == pytest.approx(1_000_000 * (2 * 64 * other.n_latents + 8 * 64 * 1.01 * other.k))


def suggestion(points, **options):
    found = rows(points)
    return next_point(found, laws(found), **options)


def test_the_next_point_narrows_the_law():
    found = suggestion(planted.points(SMALL, FEW), n_latents=1_000_000)
    assert set(found.overrides) == {"sae.n_latents", "sae.k"} and "1,000,000" in found.why
    assert found.keys == f"sae.n_latents={found.overrides['sae.n_latents']} sae.k={found.overrides['sae.k']}"


def test_the_next_point_cures_a_refusal():
    assert suggestion(planted.points(SMALL[:2], FEW)).overrides == {"sae.n_latents": 65536, "sae.k": 32}
    failed = [*planted.points(SMALL[:2], FEW), planted.Point("f", {"sae.n_latents": 65536, "sae.k": 16}, "failed")]
    assert "retry=failed" in suggestion(failed).why
    rates = [planted.point(number, {"train.lr": 10.0**-number}, 0.1 * number) for number in (2, 3, 4)]
    assert suggestion(rates).overrides == {"train.lr": 0.1}
    assert suggestion([]).overrides == {}
