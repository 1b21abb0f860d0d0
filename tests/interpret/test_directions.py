"""Logit effects and similar latents against the dense matrices that they avoid."""

import torch

from sae_dist.interpret.logit_effect import Unembedding, logit_effects
from sae_dist.interpret.similar import similar_latents


def test_logit_effects_are_the_extremes_of_the_centred_product():
    g = torch.Generator().manual_seed(0)
    W_dec, W_U = torch.randn(11, 6, generator=g), torch.randn(6, 50, generator=g) + 3
    effects = logit_effects(W_dec, Unembedding(W_U, torch.arange(50)), n_tokens=4, chunk=3)
    logits = W_dec @ W_U
    centred = logits - logits.mean(dim=1, keepdim=True)
    assert torch.equal(effects.promoted, logits.argsort(dim=1, descending=True)[:, :4])
    assert torch.equal(effects.suppressed, logits.argsort(dim=1)[:, :4])
    torch.testing.assert_close(effects.promoted_by, centred.gather(1, effects.promoted))
    torch.testing.assert_close(effects.suppressed_by, centred.gather(1, effects.suppressed))


def test_rows_of_the_embedding_without_a_token_have_no_effects():
    g = torch.Generator().manual_seed(0)
    W_dec, W_U = torch.randn(11, 6, generator=g), torch.randn(6, 50, generator=g)
    tokens = torch.tensor([0, 3, 4, 17, 48])
    effects = logit_effects(W_dec, Unembedding(W_U[:, tokens], tokens), n_tokens=5)
    logits = W_dec @ W_U[:, tokens]
    assert torch.equal(effects.promoted, tokens[logits.argsort(dim=1, descending=True)])
    assert torch.equal(effects.suppressed, effects.promoted.flip(1))


def test_similar_latents_are_the_largest_cosines_to_others():
    W_dec = torch.randn(13, 5, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 14)[:, None]
    similar = similar_latents(W_dec, n_nearest=3, chunk=4)
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1)
    cosine.fill_diagonal_(-2)
    expected = cosine.topk(3, dim=1)
    assert torch.equal(similar.latents, expected.indices)
    torch.testing.assert_close(similar.cosine, expected.values)


def test_a_twin_is_found_and_oneself_is_not():
    W_dec = torch.eye(4)
    W_dec[3] = 2 * W_dec[1]
    similar = similar_latents(W_dec, n_nearest=1)
    assert similar.latents[1].item() == 3 and similar.latents[3].item() == 1
    assert similar.cosine[1].item() == 1.0
