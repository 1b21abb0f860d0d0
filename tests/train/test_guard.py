"""The guard's decisions, worked by hand."""

import json
import math

import pytest

from sae_dist.train.guard import Guard, GuardConfig, from_facts, judge, judge_state, to_facts

CONFIG = GuardConfig(max_skipped=3, max_roll_backs=1, spike_window=8, spike_deviations=10.0)


def run(losses, config=CONFIG, guard=None):
    """The verdicts on a sequence of losses; NaN stands for a step that is not finite."""
    guard, verdicts = guard or Guard(), []
    for loss in losses:
        verdicts.append(judge(guard, config, loss=loss))
        guard = verdicts[-1].guard
    return verdicts


def decisions(verdicts):
    return [verdict.decision for verdict in verdicts]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skips_count_in_a_row_then_the_run_goes_back_and_in_the_end_stops(bad):
    verdicts = run([1.0, bad, bad, 1.0, bad, bad, bad, bad, bad, bad, bad])
    assert decisions(verdicts) == [
        "step", "skip", "skip", "step", "skip", "skip", "roll_back", "skip", "skip", "stop", "stop",
    ]  # fmt: skip
    assert verdicts[6].guard == Guard(losses=(1.0, 1.0), in_a_row=0, skipped=5, roll_backs=1)
    assert [i for i, verdict in enumerate(verdicts) if verdict.alert] == [1, 4, 6, 7, 9, 10]


def test_a_gradient_that_is_not_finite_is_left_out_whatever_the_loss():
    verdict = judge(Guard(), CONFIG, loss=0.5, finite=False)
    assert (verdict.decision, verdict.guard.losses) == ("skip", ())


@pytest.mark.parametrize("losses", [{"loss": 5e33}, {"loss": 1.0, "aux_loss": 1e9}])
def test_a_finite_loss_whose_gradients_have_no_finite_squares_is_left_out(losses):
    verdict = judge(Guard(), CONFIG, **losses)
    assert verdict.decision == "skip" and verdict.alert is not None
    assert "is too large: its gradients have no finite squares; the step is left out" in verdict.alert
    assert judge(Guard(), CONFIG, loss=1e6).decision == "step"


def test_a_state_that_is_not_finite_goes_back_at_once():
    assert judge_state(Guard(in_a_row=1), CONFIG).guard == Guard(roll_backs=1)
    assert judge_state(Guard(roll_backs=1), CONFIG).decision == "stop"


def test_no_roll_backs_means_stop():
    assert decisions(run([math.nan] * 3, GuardConfig(max_skipped=3, max_roll_backs=0))) == ["skip", "skip", "stop"]


def test_a_spike_is_ten_robust_deviations_above_the_median():
    window = (1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.0)  # median 1, absolute deviations 0 0 0 0 .1 .1 .2 .2: median .05
    bound = 1 + 10 * 1.4826 * 0.05
    assert judge(Guard(window), CONFIG, loss=bound - 1e-6).guard.spikes == 0
    spiked = judge(Guard(window), CONFIG, loss=bound + 1e-6)
    assert (spiked.decision, spiked.guard.spikes, spiked.guard.losses[-1]) == ("step", 1, bound + 1e-6)
    assert spiked.alert is not None
    assert "jumped to 1.741 (median of the last 8 steps: 1)" in spiked.alert


def test_one_alert_a_spike_and_a_lasting_change_becomes_usual():
    verdicts = run([1.0] * 8 + [5.0] * 10)
    assert [i for i, verdict in enumerate(verdicts) if verdict.alert] == [8]
    assert [verdict.guard.spiking for verdict in verdicts[8:]] == [True] * 4 + [False] * 6  # then 4 of 8 are 5.0


def test_nothing_is_a_spike_before_the_window_is_half_full_nor_with_a_window_of_zero():
    assert not any(verdict.alert for verdict in run([1.0, 1.0, 1.0, 100.0]))
    assert not any(verdict.alert for verdict in run([1.0] * 50 + [1e7], GuardConfig(spike_window=0)))


def test_skipped_spikes_do_not_enter_the_window_and_count_in_a_row():
    config = GuardConfig(max_skipped=3, spike_window=8, spike_deviations=10.0, on_spike="skip")
    verdicts = run([1.0] * 8 + [5.0] * 3, config)
    assert decisions(verdicts[8:]) == ["skip", "skip", "roll_back"]
    assert verdicts[-1].guard.losses == (1.0,) * 8


def test_the_state_survives_json_bit_for_bit():
    guard = run([1 / 3, 0.1 + 0.2, math.nan, 2**-40])[-1].guard
    assert from_facts(json.loads(json.dumps(to_facts(guard)))) == guard
