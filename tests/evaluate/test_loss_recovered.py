"""Loss recovered in a real (tiny) model."""

import pytest
import torch

from sae_dist.evaluate.heldout_text import loss_figures
from sae_dist.evaluate.loss_recovered import LossRecovered, loss_recovered
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load

MODEL = load(ModelConfig(name="tiny-llama", dtype="float32"))
TOKENS = torch.randint(3, 200, (6, 12), generator=torch.Generator().manual_seed(0))
EVERYWHERE = torch.ones_like(TOKENS, dtype=torch.bool)


def found(*reconstruct, positions=EVERYWHERE, counted=EVERYWHERE, mean=None) -> list[LossRecovered]:
    """What was found of each reconstruction."""
    parts = {4: positions[:4], 2: positions[4:]}  # by the size of the batch
    mean = torch.full((32,), 0.5) if mean is None else mean
    return loss_recovered(
        MODEL, "resid_post.1", batches=[(TOKENS[:4], counted[:4]), (TOKENS[4:], counted[4:])],
        positions=lambda tokens, x: parts[len(tokens)],
        reconstruct=reconstruct, mean=mean,
    )  # fmt: skip


def test_a_perfect_reconstruction_recovers_everything():
    (result,) = found(lambda rows: rows)
    assert result.ce_spliced == result.ce_clean
    assert result.loss_recovered == result.loss_recovered_mean == 1
    assert result.tokens == 6 * 11


def test_zeros_recover_nothing_and_the_mean_is_its_own_yardstick():
    zeros, mean = found(torch.zeros_like, lambda rows: torch.full_like(rows, 0.5))
    assert zeros.ce_spliced == zeros.ce_zero_ablated
    assert zeros.loss_recovered == 0
    assert mean.ce_spliced == mean.ce_mean_ablated
    assert mean.loss_recovered_mean == 0


def test_the_clean_loss_is_the_models_own():
    with torch.no_grad():
        logits = MODEL.model(TOKENS).logits.float()
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert found(lambda rows: rows)[0].ce_clean == pytest.approx(float(own), rel=1e-5)


def test_positions_left_alone_are_left_alone():
    (result,) = found(torch.zeros_like, positions=torch.zeros_like(EVERYWHERE))
    assert result.ce_zero_ablated == result.ce_mean_ablated == result.ce_clean
    assert result.loss_recovered is result.loss_recovered_mean is None  # nothing to recover
    first_only = EVERYWHERE.clone()
    first_only[:, 1:] = False
    (both,) = found(torch.zeros_like, positions=first_only)
    assert both.ce_zero_ablated != result.ce_clean
    assert found(torch.zeros_like, counted=first_only) == [both]  # of conversations, only what counts


def test_without_a_token_to_predict_every_figure_is_null_with_the_reason():
    (result,) = loss_recovered(
        MODEL, "resid_post.1", batches=[(TOKENS[:, :1], EVERYWHERE[:, :1])],
        positions=lambda tokens, x: torch.ones_like(tokens).bool(),
        reconstruct=[lambda rows: rows], mean=torch.zeros(32),
    )  # fmt: skip
    figures = loss_figures(result)
    assert figures["ce_tokens"] == 0 and figures["ce_clean"] is figures["loss_recovered"] is None
    assert figures["not_measured"]["loss_recovered"] == "the held-out text has no token to predict"


def test_an_ablation_without_effect_is_told_from_a_loss_that_is_not_finite():
    figures = loss_figures(LossRecovered(9, ce_clean=2.0, ce_spliced=3.0, ce_zero_ablated=2.0, ce_mean_ablated=4.0))
    assert figures["loss_recovered"] is None and figures["loss_recovered_mean"] == 0.5
    assert figures["not_measured"] == {"loss_recovered": "zero ablation does not change the cross-entropy"}
    spliced = loss_figures(LossRecovered(9, 2.0, float("nan"), 3.0, 4.0))
    assert spliced["not_measured"] == dict.fromkeys(
        ("ce_spliced", "loss_recovered", "loss_recovered_mean"), "it is not finite"
    )


def test_where_to_intervene_is_decided_on_the_activations_themselves():
    seen = []

    def positions(tokens, x):
        seen.append(x)
        return torch.zeros_like(tokens, dtype=torch.bool)

    loss_recovered(
        MODEL,
        "resid_post.1",
        batches=[(TOKENS, EVERYWHERE)],
        positions=positions,
        reconstruct=[lambda rows: rows],
        mean=torch.zeros(32),
    )
    with torch.no_grad():
        hidden = MODEL.model.model(TOKENS, output_hidden_states=True).hidden_states[2]
    assert len(seen) == 3  # spliced, zero, mean
    assert all(torch.allclose(x, hidden, atol=1e-6) for x in seen)


def test_several_dictionaries_judged_together_have_the_figures_of_each_alone():
    halved, gone = (lambda rows: rows / 2), torch.zeros_like
    assert found(halved, gone) == found(halved) + found(gone)
