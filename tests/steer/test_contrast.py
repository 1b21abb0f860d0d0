"""Latents that tell two kinds of text apart, against scipy's tests and a planted difference."""

import pytest
import torch
from sae_kernels import Active
from scipy import stats

from sae_dist.config import UserError
from sae_dist.steer.contrast import contrast, false_discovery_rates, tell_apart

N_LATENTS, N_DOCS, LENGTH = 50, 40, 30
G = torch.Generator().manual_seed(0)
DOC = torch.arange(N_DOCS * LENGTH) // LENGTH
SIDE = (DOC % 2).long()
LATENTS = torch.rand(len(DOC), N_LATENTS, generator=G) * (torch.rand(len(DOC), N_LATENTS, generator=G) < 0.1)
LATENTS[:, 3] *= 1 + 2 * SIDE  # a latent of one kind, and one of the other
LATENTS[:, 4] *= 3 - 2 * SIDE
LATENTS[:, 9] = 0.0
W_DEC = torch.nn.functional.normalize(torch.randn(N_LATENTS, 8, generator=G), dim=1)
X = LATENTS @ W_DEC


def encode(latents: torch.Tensor) -> Active:
    row, latent = latents.nonzero(as_tuple=True)
    return Active(latents[row, latent], latent, torch.nn.functional.pad((latents != 0).sum(1).cumsum(0), (1, 0)))


def batches(size: int):
    for start in range(0, len(DOC), size):
        part = slice(start, start + size)
        yield LATENTS[part], X[part], DOC[part], SIDE[part]


FOUND = contrast(batches(len(DOC)), encode, n_latents=N_LATENTS)
TOLD = tell_apart(FOUND, W_DEC)


def test_each_latent_is_tested_as_mann_and_whitney_do_with_a_document_as_one_observation():
    per_doc = LATENTS.view(N_DOCS, LENGTH, -1).mean(1)
    for latent in (0, 3, 4, 17):
        toward, away = per_doc[1::2, latent].numpy(), per_doc[::2, latent].numpy()
        known = stats.mannwhitneyu(toward, away, method="asymptotic", use_continuity=False)
        assert float(TOLD.p[latent]) == pytest.approx(known.pvalue, rel=1e-4)
        assert float(TOLD.auc[latent]) == pytest.approx(known.statistic / (20 * 20), rel=1e-5)
    torch.testing.assert_close(TOLD.toward, LATENTS[SIDE == 1].mean(0))
    torch.testing.assert_close(TOLD.away, LATENTS[SIDE == 0].mean(0))
    assert TOLD.p[9] == TOLD.q[9] == 1 and TOLD.tested == N_LATENTS - 1


def test_the_planted_latent_is_found_and_chance_is_not():
    assert TOLD.best(10) == [3]
    shuffled = SIDE[torch.randperm(N_DOCS, generator=G) * LENGTH].repeat_interleave(LENGTH)
    LATENTS_ = LATENTS.clone()
    LATENTS_[:, 3:5] = 0
    chance = contrast([(LATENTS_, X, DOC, shuffled)], encode, n_latents=N_LATENTS)
    assert tell_apart(chance, W_DEC).best(10) == []


def test_rates_are_those_of_benjamini_and_hochberg():
    p = torch.rand(200, generator=G, dtype=torch.float64) ** 2
    torch.testing.assert_close(false_discovery_rates(p), torch.as_tensor(stats.false_discovery_control(p.numpy())))


def test_it_does_not_depend_on_the_batches():
    other = contrast(batches(77), encode, n_latents=N_LATENTS)
    for one, another in zip(FOUND[:-1], other[:-1], strict=True):
        torch.testing.assert_close(one, another)


def test_where_latents_explain_all_their_shares_of_the_difference_in_means_sum_to_one():
    wanted = X[SIDE == 1].mean(0) - X[SIDE == 0].mean(0)
    torch.testing.assert_close(FOUND.difference_in_means, wanted)
    assert float(TOLD.share.sum()) == pytest.approx(1, abs=1e-4)
    assert TOLD.share[3:5].sum() > 0.5


def test_a_side_without_text_is_refused():
    with pytest.raises(UserError, match="toward: no token of that kind was found"):
        contrast([(LATENTS, X, DOC, torch.zeros_like(SIDE))], encode, n_latents=N_LATENTS)
