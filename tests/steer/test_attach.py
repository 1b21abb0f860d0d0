"""A dictionary on a running model: what it reads, what it changes, and that it leaves nothing behind."""

import pytest
import torch

import sae_dist
from sae_dist.config import UserError
from sae_dist.model.hooks import capture, replace
from sae_dist.sae.module import DictionaryModule
from sae_dist.steer.attach import add
from tests.steer.worlds import MODEL, TOKENS, D, N, dense, random_dictionary

HOOK, EVERYWHERE = "resid_post.1", slice(0, None)
DICTIONARY = random_dictionary(HOOK)
W_DEC = DICTIONARY.parameters.W_dec
X = capture(MODEL, TOKENS, [HOOK])[HOOK]
F = dense(DICTIONARY, X)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def logits(tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return MODEL(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def rewritten(hook: str, x: torch.Tensor) -> torch.Tensor:
    """Logits with other activations in place of those at `hook`."""
    with replace(MODEL, {hook: lambda _: x}):
        return logits()


def n_hooks() -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in MODEL.modules())


CLEAN = logits()


def test_without_a_change_nothing_changes():
    silent = int((F > 0).flatten(0, 1).any(0).logical_not().nonzero()[0])
    for options in ({}, {"record": [3]}, {"clamp": {silent: 0.0}, "at": EVERYWHERE}):
        with sae_dist.attach(MODEL, DICTIONARY, **options):
            assert torch.equal(logits(), CLEAN)


def test_a_clamp_moves_the_activation_by_what_is_missing_and_holds_the_error():
    latents, values = [5, 9, 40], [3.0, 0.0, -2.0]
    wanted = X.clone()
    for latent, value in zip(latents, values, strict=True):
        wanted += (value - F[..., latent])[..., None] * W_DEC[latent]
    with sae_dist.attach(MODEL, DICTIONARY, clamp=dict(zip(latents, values, strict=True)), at=EVERYWHERE):
        torch.testing.assert_close(logits(), rewritten(HOOK, wanted), **CLOSE)
    clamped = F.clone()
    clamped[..., latents] = torch.tensor(values)
    error = X - (F @ W_DEC + DICTIONARY.parameters.b_dec)
    torch.testing.assert_close(wanted, clamped @ W_DEC + DICTIONARY.parameters.b_dec + error, **CLOSE)


def test_a_dictionary_that_was_loaded_as_a_module_is_attached_too():
    with sae_dist.attach(MODEL, DICTIONARY, replace=True):
        wanted = logits()
    with sae_dist.attach(MODEL, DictionaryModule(DICTIONARY), replace=True):
        assert torch.equal(logits(), wanted)


def test_replacing_leaves_the_error_out():
    x_hat = F @ W_DEC + DICTIONARY.parameters.b_dec
    wanted = X.clone()
    wanted[:, 1:] = x_hat[:, 1:]  # by default the first position is left alone
    with sae_dist.attach(MODEL, DICTIONARY, replace=True):
        torch.testing.assert_close(logits(), rewritten(HOOK, wanted), **CLOSE)
    with sae_dist.attach(MODEL, DICTIONARY, replace=True, clamp={5: 3.0}, at=EVERYWHERE):
        moved = x_hat + (3.0 - F[..., 5])[..., None] * W_DEC[5]
        torch.testing.assert_close(logits(), rewritten(HOOK, moved), **CLOSE)


def test_on_a_linear_readout_a_clamp_moves_each_logit_by_exactly_its_share():
    dictionary = random_dictionary("model.norm")  # what the unembedding multiplies
    x = capture(MODEL, TOKENS, ["model.norm"])["model.norm"]
    wanted = (7.0 - dense(dictionary, x)[..., 11])[..., None] * (
        dictionary.parameters.W_dec[11] @ MODEL.lm_head.weight.T
    )
    with sae_dist.attach(MODEL, dictionary, clamp={11: 7.0}, at=EVERYWHERE):
        torch.testing.assert_close(logits() - CLEAN, wanted, **CLOSE)


def test_only_the_span_is_changed():
    moved = X.clone()
    moved[:, 4:7] += (3.0 - F[:, 4:7, 5])[..., None] * W_DEC[5]
    with sae_dist.attach(MODEL, DICTIONARY, clamp={5: 3.0}, at=slice(4, 7)):
        found = logits()
    torch.testing.assert_close(found, rewritten(HOOK, moved), **CLOSE)
    assert torch.equal(found[:, :4], CLEAN[:, :4])


def test_padding_on_the_left_moves_the_span_with_the_text():
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), TOKENS], 1)
    mask = (torch.arange(17) >= 5).long().expand(3, 17)
    with sae_dist.attach(MODEL, DICTIONARY, clamp={5: 3.0}, at=slice(4, 7)), torch.no_grad():
        found = MODEL(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        torch.testing.assert_close(found[:, 5:], logits(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [slice(1, None), slice(14, 18), slice(3, 14)])
def test_with_a_cache_it_writes_what_it_writes_without(at):
    tokens = TOKENS[:1]
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
               "output_logits": True, "return_dict_in_generate": True,
               "attention_mask": torch.ones_like(tokens)}  # fmt: skip
    with sae_dist.attach(MODEL, DICTIONARY, clamp={5: 6.0, 9: 2.0}, at=at, record=[5, 9]) as attached:
        cached = MODEL.generate(tokens, use_cache=True, **options)
        recorded = attached.recorded
        attached.clear()
        slow = MODEL.generate(tokens, use_cache=False, **options)
        with torch.no_grad():
            attached.clear()
            MODEL(input_ids=cached.sequences[:, :-1], use_cache=False)
    assert torch.equal(cached.sequences, slow.sequences)
    for one, other in zip(cached.logits, slow.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(recorded, attached.recorded, rtol=1e-4, atol=1e-4)
    assert recorded.shape == (1, 21, 2)


def test_it_reads_the_latents_of_the_unchanged_activation():
    with sae_dist.attach(MODEL, DICTIONARY, clamp={5: 3.0}, record=[5, 7]) as attached:
        logits()
        torch.testing.assert_close(attached.recorded, F[..., [5, 7]])
        assert attached.active.indices.shape == (TOKENS.numel() * 4,)
        logits(TOKENS[:, :2])
        assert attached.recorded.shape == (3, 14, 2)
        attached.clear()
        assert attached.recorded.shape[1] == 0


def test_a_transcoder_reads_one_point_and_writes_another():
    transcoder = random_dictionary("resid_pre.1", "mlp_out.1")
    both = capture(MODEL, TOKENS, ["resid_pre.1", "mlp_out.1"])
    latents = dense(transcoder, both["resid_pre.1"])
    wanted = both["mlp_out.1"] + (4.0 - latents[..., 5])[..., None] * transcoder.parameters.W_dec[5]
    with sae_dist.attach(MODEL, transcoder, clamp={5: 4.0}, at=EVERYWHERE):
        torch.testing.assert_close(logits(), rewritten("mlp_out.1", wanted), **CLOSE)
    backwards = random_dictionary("resid_post.2", "mlp_out.1")
    with sae_dist.attach(MODEL, backwards, clamp={5: 4.0}), pytest.raises(UserError, match="runs before"):
        logits()


def test_a_vector_is_added_where_it_is_asked_for():
    vector = torch.randn(D, generator=torch.Generator().manual_seed(2))
    moved = X.clone()
    moved[:, 2:] += vector
    with add(MODEL, HOOK, vector, at=slice(2, None)):
        torch.testing.assert_close(logits(), rewritten(HOOK, moved), **CLOSE)


def test_nothing_is_left_behind_also_after_an_error():
    before = n_hooks()
    with sae_dist.attach(MODEL, DICTIONARY, clamp={5: 3.0}, replace=True):
        assert n_hooks() > before
        logits()
    assert n_hooks() == before and torch.equal(logits(), CLEAN)
    with pytest.raises(ZeroDivisionError), sae_dist.attach(MODEL, DICTIONARY, clamp={5: 3.0}):
        raise ZeroDivisionError
    with sae_dist.attach(MODEL, DICTIONARY, clamp={5: 3.0}), pytest.raises(IndexError):
        MODEL(input_ids=TOKENS + 10_000)
    assert n_hooks() == before and torch.equal(logits(), CLEAN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clamp": {N: 1.0}}, f"clamp has latent {N}, but the dictionary has 64 latents; give a number from 0 to 63"),
        ({"clamp": {-1: 1.0}}, "clamp has latent -1"),
        ({"record": [64]}, "record has latent 64"),
        ({"clamp": {3: "ten"}}, r"clamp=\{3: ten\} is not understood; give a value"),
        ({"clamp": {3: "10x"}}, "give run=, the folder of a run with feature pages, or a value"),
        ({"clamp": {3: "10x"}, "run": "/nowhere"}, "/nowhere/pages/data/index.js is missing"),
        ({"at": slice(0, 9, 2)}, "is no span of positions"),
        ({"at": slice(-3, None)}, "is no span of positions"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_and_leaves_nothing(options, message):
    before = n_hooks()
    with pytest.raises(UserError, match=message), sae_dist.attach(MODEL, DICTIONARY, **options):
        pass
    assert n_hooks() == before


def test_a_dictionary_of_another_model_is_refused():
    other = random_dictionary("mlp_act.1", "mlp_out.1")  # which is 96 wide here
    with pytest.raises(UserError, match="is 32 wide at mlp_act.1, tiny-llama is 96 wide there; give the model"), \
            sae_dist.attach(MODEL, other):  # fmt: skip
        pass
    nowhere = random_dictionary("resid_post.77")
    with pytest.raises(UserError, match="does not exist"), sae_dist.attach(MODEL, nowhere):
        pass


def test_the_package_says_what_it_does_not_have():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sae_dist.nothing
