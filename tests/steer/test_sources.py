"""What a latent reads: its terms sum to its pre-activation, and each is what the model has there."""

import pytest
import torch

from sae_dist.config import UserError
from sae_dist.model.hooks import capture
from sae_dist.steer.sources import layer_read, read
from tests.steer.worlds import LANGUAGE_MODEL, MODEL, TOKENS, random_dictionary

LATENT, AT = 5, 8


@pytest.mark.parametrize(("hook", "layer"), [("resid_post.1", 1), ("resid_pre.2", 1), ("attn_out.2", 2)])
@pytest.mark.parametrize("target", [None, "mlp_out.3"])
def test_terms_sum_to_the_pre_activation(hook, layer, target):
    dictionary, tokens = random_dictionary(hook, target), TOKENS[0]
    found = read(LANGUAGE_MODEL, dictionary, hook, tokens, AT, LATENT)
    W_enc, _, b_enc, b_dec = dictionary.parameters
    w, names = W_enc[:, LATENT], [f"resid_pre.{layer}", f"mlp_out.{layer}", f"attn_out.{layer}", hook]
    states = capture(MODEL, TOKENS[:1], names)
    resid, mlp, attention, x = (states[name][0, AT] for name in names)
    centre = b_dec if target is None else dictionary.b_in
    near = {"rel": 1e-4, "abs": 1e-4}
    assert found.pre_activation == pytest.approx(float((x - centre) @ w + b_enc[LATENT]), **near)
    assert float(found.heads.sum()) == pytest.approx(float(attention @ w), **near)  # this model's attention has no bias
    assert found.bias == pytest.approx(float(b_enc[LATENT] - centre @ w), **near)
    if hook.startswith("attn_out"):
        assert found.stream is found.mlp is None
    else:
        assert found.stream == pytest.approx(float(resid @ w), **near)
        assert found.mlp == pytest.approx(float(mlp @ w), **near)
    assert found.layer == layer and found.heads.shape == (4, len(tokens)) and not found.heads[:, AT + 1 :].any()


@pytest.mark.parametrize("hook", ["resid_pre.0", "mlp_out.1", "mlp_act.1", "model.norm"])
def test_hook_points_that_no_attention_writes_into_are_refused(hook):
    with pytest.raises(UserError, match=f"this one reads {hook}"):
        layer_read(hook)
    assert layer_read("resid_pre.1") == ("resid_pre", 0)


def test_what_a_latent_reads_does_not_depend_on_later_tokens():
    dictionary = random_dictionary("resid_post.1")
    changed = TOKENS[0].clone()
    changed[AT + 1 :] = 7
    whole, other = (read(LANGUAGE_MODEL, dictionary, "resid_post.1", each, AT, LATENT) for each in (TOKENS[0], changed))
    torch.testing.assert_close(whole.heads, other.heads)
