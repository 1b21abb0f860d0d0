"""Attribution against ablation: equal where the readout is linear, of one order where it is a trained network."""

import pytest
import torch
from torch import nn

from sae_dist.model.hooks import capture
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.steer.attribution import ablate, attribute, logit_difference, rank_correlation
from tests.steer.worlds import MODEL, TOKENS, random_dictionary

N, D = 24, 16
LABEL = 7  # the feature that decides the label, with a little of the others


class Planted:
    """Sparse features in superposition, a network that was trained to read a label, and a dictionary near them."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.directions = nn.functional.normalize(torch.randn(N, D, generator=g), dim=1)
        strength = torch.rand(4000, N, generator=g) * (torch.rand(4000, N, generator=g) < 0.12)
        self.x, label = strength @ self.directions, strength[:, LABEL] > 0.3
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(self.network.parameters(), lr=5e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.network(self.x), label.long()).backward()
            optimizer.step()
        rows = nn.functional.normalize(self.directions + 0.05 * torch.randn(N, D, generator=g), dim=1)
        order = torch.randperm(N, generator=g)  # which latent is the feature has to be found
        parameters = Parameters(rows[order].T, rows[order], torch.full((N,), -0.05), torch.zeros(D))
        self.dictionary = Dictionary(parameters=parameters, k=5, info={"variant": "topk"})
        self.matched = int((self.dictionary.parameters.W_dec @ self.directions[LABEL]).argmax())
        self.labelled = self.x[label][:40]

    def score(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x)
        return (logits[:, 1] - logits[:, 0]).mean()


@pytest.fixture(scope="module")
def planted() -> Planted:
    with torch.random.fork_rng():
        return Planted()


def test_ablating_the_planted_latent_costs_the_label_ten_times_what_others_cost(planted):
    active = planted.dictionary.encode(planted.labelled)
    lost = ablate(planted.score, planted.labelled, active, planted.dictionary.parameters.W_dec, range(N))
    others = torch.cat([lost[: planted.matched], lost[planted.matched + 1 :]])
    assert lost[planted.matched] > 10 * others.abs().median() > 0
    assert lost.argmax() == planted.matched


@pytest.mark.parametrize("steps", [0, 8])
def test_through_a_trained_network_attribution_orders_latents_as_ablation_does(planted, steps):
    W_dec, correlations = planted.dictionary.parameters.W_dec, []
    for row in planted.labelled.split(1):
        active = planted.dictionary.encode(row)
        latents, effects = attribute(planted.score, row, active, W_dec, steps=steps).of_latents()
        lost = ablate(planted.score, row, active, W_dec, latents.tolist())
        correlations.append(torch.stack([effects, lost]))
    effects, lost = torch.cat(correlations, 1)
    assert len(effects) > 100 and (rank_correlation(effects, lost) or 0) >= 0.8


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3, 4], [1, 1, 2, 2], 0.894427), ([3, 2, 1], [3, 2, 1], 1), ([3, 2, 1], [0, 0, 0], None),
     ([1, 2], [1, 2], None),
     ([5, 5, 1, 0], [0, 0, 2, 2], -0.942809)],
)  # fmt: skip
def test_equal_values_share_a_rank(a, b, expected):
    """Worked by hand: Pearson's r of (1, 2, 3, 4) with (1.5, 1.5, 3.5, 3.5), and so on."""
    found = rank_correlation(torch.tensor(a, dtype=torch.float), torch.tensor(b, dtype=torch.float))
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_integrated_gradients_sum_to_what_all_latents_together_are_worth(planted):
    x, W_dec = planted.labelled, planted.dictionary.parameters.W_dec
    active = planted.dictionary.encode(x)
    explained = planted.dictionary.decode(active) - planted.dictionary.parameters.b_dec
    with torch.no_grad():
        together = planted.score(x) - planted.score(x - explained)
    total = attribute(planted.score, x, active, W_dec, steps=200).effects.sum()
    torch.testing.assert_close(total, together, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("logits", [[65, 66], [65]])
@pytest.mark.parametrize("steps", [0, 3])
def test_on_a_linear_readout_attribution_is_ablation(logits, steps):
    hook, tokens = "model.norm", TOKENS[0]  # what the unembedding multiplies
    dictionary, x = random_dictionary(hook), capture(MODEL, TOKENS[:1], [hook])[hook][0]
    active, score = dictionary.encode(x), logit_difference(MODEL, hook, tokens, logits)
    found = attribute(score, x, active, dictionary.parameters.W_dec, steps=steps)
    latents, effects = found.of_latents()
    lost = ablate(score, x, active, dictionary.parameters.W_dec, latents.tolist())
    torch.testing.assert_close(effects, lost, rtol=1e-4, atol=1e-4)
    W_U = MODEL.lm_head.weight
    direction = W_U[logits[0]] - (W_U[logits[1]] if len(logits) > 1 else W_U.mean(0))
    last = found.rows == len(tokens) - 1
    by_hand = found.values * (dictionary.parameters.W_dec[found.latents] @ direction) * last
    torch.testing.assert_close(found.effects, by_hand, rtol=1e-4, atol=1e-5)


def test_a_latent_earlier_in_the_text_has_an_effect_through_attention():
    hook, tokens = "resid_post.0", TOKENS[0]
    dictionary, x = random_dictionary(hook), capture(MODEL, TOKENS[:1], [hook])[hook][0]
    score = logit_difference(MODEL, hook, tokens, [65, 66])
    found = attribute(score, x, dictionary.encode(x), dictionary.parameters.W_dec)
    assert (found.effects[found.rows < len(tokens) - 1].abs() > 1e-4).any()
