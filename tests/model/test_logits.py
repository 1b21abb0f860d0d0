"""Unembedding and next-token loss against the model's own logits, in every family."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from sae_dist.config import UserError
from sae_dist.model import hooks, logits
from tests.model.families import OTHERS, other


def subtracts_the_mean(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) or type(norm).__name__ in (
        "CohereLayerNorm",
        "Cohere2LayerNorm",
        "OlmoLayerNorm",
    )


def test_the_stream_through_the_unembedding_gives_the_logits(family, tokens):
    """Differences between positions, for constants (norm and head biases) are left out of the matrix."""
    x = hooks.capture(family, tokens, ["resid_post.2"])["resid_post.2"]
    norm = next(m for n, m in family.get_decoder().named_children() if n in ("norm", "ln_f") or n.startswith("final_"))
    scale = x.std(-1, correction=0) if subtracts_the_mean(norm) else x.square().mean(-1).sqrt()
    got = x @ logits.unembedding(family) / scale[..., None]
    want = family(tokens).logits
    if family.config.model_type == "gemma2":
        want = torch.atanh(want / 3.0) * 3.0
    # eps inside the norms (1e-5 beside a variance near 1) and, for Gemma 2, the inverse of a saturating squash
    torch.testing.assert_close(got - got[:1, :1], want - want[:1, :1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", sorted(OTHERS.keys() - {"bert", "openai-gpt"}))
def test_the_unembedding_of_a_family_that_is_in_no_table_gives_its_logits(name, tokens):
    model = other(name)
    x = hooks.capture(model, tokens, ["resid_post.2"])["resid_post.2"]
    W_U = logits.unembedding(model)
    centred = bool(W_U.mean(0).abs().max() < 1e-5)
    scale = x.std(-1, correction=0) if centred else x.square().mean(-1).sqrt()
    got, want = x @ W_U / scale[..., None], model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(got - got[:1, :1], want - want[:1, :1], rtol=2e-2, atol=2e-2)
    logits.check_direct_path(model, "resid_post.0")


@pytest.mark.parametrize(
    ("name", "hook", "why"),
    [
        ("bert", "resid_post.1", "BertLMHeadModel has no final norm by a known name"),
        ("openai-gpt", "resid_post.1", "OpenAIGPTLMHeadModel has no final norm by a known name"),
        ("mpt", "transformer.blocks.1.ffn.up_proj", "is not in the residual stream"),
    ],
)
def test_no_direct_path_is_said(name, hook, why):
    with pytest.raises(UserError, match=why):
        logits.check_direct_path(other(name), hook)


def test_a_layer_norm_ignores_the_mean_of_a_direction(family):
    centred = logits.unembedding(family).mean(0).abs().max() < 1e-6
    assert centred == any(map(subtracts_the_mean, family.modules()))


def test_the_unembedding_of_narrow_embeddings_takes_the_projection_along(tokens):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40, word_embed_proj_dim=12,
        do_layer_norm_before=False, pad_token_id=1, init_std=0.2,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    x = hooks.capture(model, tokens, ["resid_post.1"])["resid_post.1"]
    torch.testing.assert_close(x @ logits.unembedding(model), model(tokens).logits)


@pytest.mark.parametrize("chunk", [1, 3, 256])  # a row at a time; three, with a tail; all at once
def test_next_token_loss_is_the_cross_entropy_of_the_models_logits(family, tokens, chunk, monkeypatch):
    monkeypatch.setattr(logits, "_CHUNK_ROWS", chunk)
    want = F.cross_entropy(family(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(logits.next_token_loss(family, tokens), want, rtol=1e-5, atol=1e-5)


def test_next_token_loss_of_a_family_nobody_checked_comes_from_its_own_logits(tokens):
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4)).eval()
    want = F.cross_entropy(model(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(logits.next_token_loss(model, tokens), want)


def test_the_loss_sees_a_rewrite(family, tokens):
    """With the stream zeroed before the first layer every position is predicted from position alone."""
    with hooks.replace(family, {"resid_post.2": torch.zeros_like}):
        loss = logits.next_token_loss(family, tokens)
    same_target = tokens[0, 1].item()
    again = tokens.clone()
    again[:, 1:] = same_target
    with hooks.replace(family, {"resid_post.2": torch.zeros_like}):
        flat = logits.next_token_loss(family, again)
    torch.testing.assert_close(flat, loss[0, 0].expand_as(flat))
