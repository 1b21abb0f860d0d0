"""Facts about the real model that later parts rely on."""

import pytest
import torch

from sae_dist.model import hooks
from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load
from sae_dist.model.logits import next_token_loss, unembedding

TEXT = """The residual stream is a sum: every layer reads it, and adds what it has found. A dictionary of directions
takes the sum apart again. In the beginning there were many more directions than dimensions, and only a few of them
were in use at any word; so the words themselves must say which. It was a bright cold day in the north, and the ships
that had waited for the wind all week left the harbour one after another, their sails grey against the water."""


@pytest.fixture(scope="module")
def tokens(smollm2) -> torch.Tensor:
    return smollm2.tokenizer(TEXT, return_tensors="pt").input_ids


def test_greedy_text_knows_the_capital_of_france(smollm2):
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    written = smollm2.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(written[0])


def test_the_first_position_is_an_outlier_of_the_residual_stream(smollm2, tokens):
    """Its norm, 24,000 beside 140, is why a store's row policy leaves it out."""
    norms = hooks.capture(smollm2.model, tokens, ["resid_post.11"])["resid_post.11"].float().norm(dim=-1)[0]
    assert norms[0] > 20 * norms[1:].median() and norms[0] > 10_000
    assert norms[1:].max() < norms[0] / 20


@pytest.mark.slow
def test_bfloat16_stays_near_float32(smollm2, tokens):
    """bf16 keeps 8 bits, 2**-9 = 0.2 % an operation; ten layers of them were measured at about 1 %."""
    exact = load(ModelConfig(name="smollm2", dtype="float32", device="cpu"))
    hook = "resid_post.9"
    near = hooks.capture(smollm2.model, tokens, [hook])[hook][:, 1:].float()
    far = hooks.capture(exact.model, tokens, [hook])[hook][:, 1:]
    error = (near - far).norm(dim=-1) / far.norm(dim=-1)
    assert error.mean() < 0.02 and error.max() < 0.06
    losses = [next_token_loss(language_model.model, tokens).mean() for language_model in (smollm2, exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.01, atol=0)


def test_it_predicts_english_far_better_than_chance(smollm2, tokens):
    loss = next_token_loss(smollm2.model, tokens)
    assert loss.shape == (1, tokens.shape[1] - 1) and loss.dtype == torch.float32
    assert loss.mean() < 5.4  # half of chance, log(49152) = 10.8; measured 4.5, without a separator before the text


def test_the_last_residual_read_through_the_unembedding_ranks_the_models_own_next_token_first(smollm2, tokens):
    x = hooks.capture(smollm2.model, tokens, ["resid_post.29"])["resid_post.29"].float()
    read = x @ unembedding(smollm2.model) / x.square().mean(-1, keepdim=True).sqrt()  # its gain is folded in
    next_token = smollm2.model(tokens).logits.argmax(-1)
    behind = read.max(-1).values - read.gather(-1, next_token[..., None]).squeeze(-1)
    assert behind.max() < 0.125, behind  # bf16 logits have steps of 0.06 up to 16 and 0.125 above: ties fall either way
    assert (behind == 0).float().mean() > 0.9


def test_the_tokenizer_is_fast_and_gives_the_text_back(smollm2):
    encoded = smollm2.tokenizer(TEXT, return_offsets_mapping=True)
    assert smollm2.tokenizer.is_fast and smollm2.tokenizer.decode(encoded.input_ids) == TEXT
    assert len(smollm2.tokenizer) == smollm2.model.config.vocab_size == 49_152
