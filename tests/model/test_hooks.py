"""Hook points: read and rewritten where they say they are, in every family."""

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForCausalLM, BloomConfig, BloomForCausalLM

from sae_dist.config import UserError
from sae_dist.model import cost, hooks
from sae_dist.model.families import layer_paths, layers
from tests.model.conftest import random_model
from tests.model.families import OTHERS, other

EXACT = {"rtol": 0, "atol": 0}
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


def run_layers(model: nn.Module) -> tuple[list[int], list]:
    """Counts the calls of each layer; the second result undoes it."""
    calls = [0] * len(layers(model))

    def count(i: int):
        def hook(*_) -> None:
            calls[i] += 1

        return hook

    return calls, [layer.register_forward_hook(count(i)) for i, layer in enumerate(layers(model))]


def test_resid_is_what_transformers_calls_hidden_states(family, tokens):
    states = family(tokens, output_hidden_states=True, use_cache=False).hidden_states
    got = hooks.capture(family, tokens, [f"resid_pre.{i}" for i in range(3)] + ["resid_post.0", "resid_post.1"])
    for layer in range(3):
        torch.testing.assert_close(got[f"resid_pre.{layer}"], states[layer], **EXACT)
    torch.testing.assert_close(got["resid_post.0"], states[1], **EXACT)
    torch.testing.assert_close(got["resid_post.1"], states[2], **EXACT)


def test_the_last_resid_post_is_before_the_final_norm(family, tokens):
    inputs = []
    norm = next(m for n, m in family.get_decoder().named_children() if n in ("norm", "ln_f") or n.startswith("final_"))
    handle = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    family(tokens)
    handle.remove()
    torch.testing.assert_close(hooks.capture(family, tokens, ["resid_post.2"])["resid_post.2"], inputs[0], **EXACT)


def test_attention_and_mlp_outputs_add_up_to_the_stream(family, tokens):
    got = hooks.capture(family, tokens, hooks.available(family))
    assert len(got) == 3 * (4 if layer_paths(family).mlp_act is None else 5)
    for layer in range(3):
        parts = [got[f"{kind}.{layer}"] for kind in ("resid_pre", "attn_out", "mlp_out")]
        torch.testing.assert_close(sum(parts), got[f"resid_post.{layer}"], **SUMS)
        assert all(part.shape == (3, 7, 32) and part.std() > 1e-3 for part in parts)


def test_mlp_act_is_what_the_down_projection_multiplies(dense_family, tokens):
    family = dense_family
    inside = family.get_submodule(next(n for n, m in family.named_modules() if m is layers(family)[1]))
    mlp = getattr(inside, "mlp", inside)
    down = next(getattr(mlp, n) for n in ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out") if hasattr(mlp, n))
    path = next(n for n, m in family.named_modules() if m is down)
    got = hooks.capture(family, tokens, ["mlp_act.1", path])
    d_mlp = 128 if family.config.model_type in ("gpt2", "gptj", "codegen", "gpt_neo") else 40
    assert got["mlp_act.1"].shape == (3, 7, d_mlp) and hooks.width(family, "mlp_act.1") == d_mlp
    torch.testing.assert_close(down(got["mlp_act.1"]), got[path], **SUMS)


def test_capture_stops_at_the_last_layer_needed(family, tokens):
    calls, handles = run_layers(family)
    handles.append(family.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1)))
    hooks.capture(family, tokens, ["resid_post.1", "mlp_out.0"])
    assert calls == [1, 1, 0]
    hooks.capture(family, tokens, ["resid_pre.1"])
    assert calls == [2, 1, 0]  # layer 1 is entered, and left before it computes
    for handle in handles:
        handle.remove()


def test_an_identity_at_every_hook_leaves_the_logits_bitwise_unchanged(family, tokens):
    before = family(tokens).logits
    with hooks.replace(family, dict.fromkeys(hooks.available(family), lambda x: x.clone())):
        assert torch.equal(family(tokens).logits, before)
    assert torch.equal(family(tokens).logits, before)


def test_ablating_a_write_leaves_the_rest_of_the_stream(family, tokens):
    with hooks.replace(family, {"mlp_out.1": torch.zeros_like}):
        got = hooks.capture(family, tokens, ["resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1"])
    assert not got["mlp_out.1"].any()
    torch.testing.assert_close(got["resid_pre.1"] + got["attn_out.1"], got["resid_post.1"], **SUMS)


def test_splicing_in_another_run_moves_everything_downstream(family, tokens):
    other = tokens.flip(1)
    donor = hooks.capture(family, other, ["resid_post.1"])["resid_post.1"]
    with hooks.replace(family, {"resid_post.1": lambda x: donor}):
        spliced = family(tokens).logits
    torch.testing.assert_close(spliced, family(other).logits, **SUMS)


def test_a_mixture_of_experts_has_no_hidden_activations_of_all_tokens():
    with pytest.raises(UserError, match="it has resid_pre.L attn_out.L mlp_out.L resid_post.L with L from 0 to 2"):
        hooks.resolve(random_model("mixtral"), "mlp_act.0")


def test_zeroed_hidden_activations_leave_only_the_bias(dense_family, tokens):
    with hooks.replace(dense_family, {"mlp_act.0": torch.zeros_like}):
        got = hooks.capture(dense_family, tokens, ["mlp_act.0", "mlp_out.0"])
    assert not got["mlp_act.0"].any()
    torch.testing.assert_close(got["mlp_out.0"], got["mlp_out.0"][:1, :1].expand(3, 7, -1), **EXACT)


def test_rewrites_are_undone_when_the_body_raises(tiny_llama, tokens):
    before = tiny_llama.model(tokens).logits
    with pytest.raises(KeyError), hooks.replace(tiny_llama.model, {"resid_post.1": torch.zeros_like}):
        raise KeyError
    assert torch.equal(tiny_llama.model(tokens).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.model.modules())


def test_hooks_are_removed_when_a_rewrite_raises(tiny_llama, tokens):
    model = tiny_llama.model
    with (
        pytest.raises(ValueError, match="gave \\(3, 7, 31\\) for \\(3, 7, 32\\)"),
        hooks.replace(model, {"attn_out.1": lambda x: x[..., 1:]}),
    ):
        model(tokens)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_generation_with_a_cache_sees_the_rewrite(tiny_llama, tokens):
    """Clamping a direction at every new token gives what recomputing the whole text each time gives."""
    model, direction = tiny_llama.model, torch.eye(32)[3]

    def clamp(x):
        return x + (5 - x[..., 3:4]) * direction

    with hooks.replace(model, {"resid_post.1": clamp}):
        written = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        slow = tokens
        for _ in range(6):
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, slow)
    assert not torch.equal(written, model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_a_rewrite_may_compute_in_float32_for_a_bfloat16_model(smollm2):
    tokens = smollm2.tokenizer("one two three", return_tensors="pt").input_ids
    with hooks.replace(smollm2.model, {"resid_post.9": lambda x: x.float()}):
        got = hooks.capture(smollm2.model, tokens, ["resid_post.9"])["resid_post.9"]
    assert torch.equal(got, hooks.capture(smollm2.model, tokens, ["resid_post.9"])["resid_post.9"])


def test_any_module_path_is_a_hook_point(tiny_llama, tokens):
    got = hooks.capture(tiny_llama.model, tokens, ["model.layers.2.mlp", "mlp_out.2", "lm_head"])
    assert torch.equal(got["model.layers.2.mlp"], got["mlp_out.2"])
    assert torch.equal(got["lm_head"], tiny_llama.model(tokens).logits)
    assert list(got) == ["model.layers.2.mlp", "mlp_out.2", "lm_head"]


def test_captured_activations_carry_no_gradient(tokens):
    model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4))
    assert not hooks.capture(model, tokens, ["resid_post.0"])["resid_post.0"].requires_grad


def test_a_family_of_unknown_inside_has_only_its_layers_ends(tokens):
    model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4)).eval()
    assert hooks.available(model) == ["resid_pre.0", "resid_post.0", "resid_pre.1", "resid_post.1"]
    with pytest.raises(UserError, match="mlp_out.1.*BloomForCausalLM.*resid_pre.L resid_post.L"):
        hooks.resolve(model, "mlp_out.1")


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_that_is_in_no_table_is_read_at_its_layers_ends_and_at_any_module(name, tokens):
    model = other(name)
    last = f"resid_post.{len(layers(model)) - 1}"
    path = next(name for name, module in model.named_modules() if module is layers(model)[-1])
    got = hooks.capture(model, tokens, ["resid_pre.1", "resid_post.0", last, path])
    assert torch.equal(got["resid_pre.1"], got["resid_post.0"]) and torch.equal(got[last], got[path])
    assert all(x.shape == (3, 7, 32) for x in got.values())
    with hooks.replace(model, {last: torch.zeros_like}):
        assert not hooks.capture(model, tokens, [last])[last].any()
    assert cost.flop_per_token(model, ["resid_post.0"], 7) < cost.flop_per_token(model, [last], 7)
    assert cost.bytes_per_token(model, [last], 7) > 0


def test_a_family_whose_layers_cannot_be_told_has_its_module_paths(tokens):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "decoder_attention_heads": 4}
    model = BartForCausalLM(BartConfig(vocab_size=61, decoder_ffn_dim=40, **sizes)).eval()
    path = "model.decoder.layers.1"
    assert hooks.available(model) == [] and hooks.width(model, path) == 32
    assert cost.flop_per_token(model, [path], 7) > 0 and cost.bytes_per_token(model, [path], 7) > 0
    with pytest.raises(UserError, match="resid_post.1.*BartForCausalLM.*give a module path such as"):
        hooks.resolve(model, "resid_post.1")


@pytest.mark.parametrize(
    "hook", ["resid_post.4", "resid_post.-1", "resid_post", "resid_mid.1", "model.layers.9.mlp", ""]
)
def test_a_hook_that_does_not_exist_is_refused_with_what_does(tiny_llama, hook):
    with pytest.raises(UserError) as error:
        hooks.resolve(tiny_llama.model, hook)
    for word in (repr(hook), "tiny-llama", "resid_post.L", "0 to 3", "model.layers.3"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        ("model.rotary_emb", "does not run|gives a tensor"),
        ("model", "BaseModelOutput"),
        ("model.layers", "does not run"),
    ],
)
def test_a_module_without_activations_is_refused(tiny_llama, tokens, hook, why):
    with pytest.raises(UserError, match=why):
        hooks.capture(tiny_llama.model, tokens, [hook])
