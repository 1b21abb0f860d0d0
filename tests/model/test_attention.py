"""What attention moves, against ablation of heads in every family, and against autograd."""

from typing import Any

import pytest
import torch

from sae_dist.config import UserError
from sae_dist.model.attention import moved_along
from sae_dist.model.families import layer_paths, layers
from sae_dist.model.hooks import capture

LAYER, AT = 1, 5
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(0))


def test_each_head_writes_what_zeroing_it_takes_away(family, tokens):
    before = family.config._attn_implementation
    moved = moved_along(family, tokens[0], LAYER, AT, DIRECTION)
    assert family.config._attn_implementation == before
    assert moved.shape[1] == tokens.shape[1] and not moved[:, AT + 1 :].any() and moved[:, : AT + 1].any(0).all()
    projection = layers(family)[LAYER].get_submodule(layer_paths(family).heads)
    path = next(name for name, module in family.named_modules() if module is projection)
    whole = capture(family, tokens[:1], [path, f"attn_out.{LAYER}"])
    factor = whole[f"attn_out.{LAYER}"][0, AT] / whole[path][0, AT]  # of the norm, where there is one
    for head, own in enumerate(moved.sum(1)):

        def silence(_, args, head=head):
            (x,) = args
            parts = list(x.chunk(len(moved), -1))
            parts[head] = torch.zeros_like(parts[head])
            return (torch.cat(parts, -1),)

        handle = projection.register_forward_pre_hook(silence)
        without = capture(family, tokens[:1], [path])[path][0, AT]
        handle.remove()
        lost = ((whole[path][0, AT] - without) * factor) @ DIRECTION
        torch.testing.assert_close(own, lost, rtol=1e-3, atol=1e-4)


def test_each_token_brings_its_value_times_the_gradient(tiny_llama, tokens):
    model = tiny_llama.model
    own: Any = layers(model)[LAYER].self_attn
    kept = []

    def keep(_, __, output):
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = own.v_proj.register_forward_hook(keep)
    out = []
    attention = own.register_forward_hook(lambda _, __, output: out.append(output[0]))
    with torch.enable_grad():
        model(tokens[:1])
        (gradient,) = torch.autograd.grad(out[0][0, AT] @ DIRECTION, kept[0])
    handle.remove()
    attention.remove()
    found = moved_along(model, tokens[0], LAYER, AT, DIRECTION).sum(0)
    torch.testing.assert_close(found, (gradient * kept[0]).sum(-1)[0].detach(), rtol=1e-4, atol=1e-5)


def test_attention_that_does_more_is_refused(tiny_llama, tokens):
    attention: Any = layers(tiny_llama.model)[LAYER].self_attn
    handle = attention.register_forward_hook(lambda _, __, output: (output[0] + 1, *output[1:]))
    try:
        with pytest.raises(UserError, match="attn_out.1 of tiny-llama is not a sum of its tokens' values"):
            moved_along(tiny_llama.model, tokens[0], LAYER, AT, DIRECTION)
    finally:
        handle.remove()
    with pytest.raises(UserError, match="hook='attn_out.9' does not exist"):
        moved_along(tiny_llama.model, tokens[0], 9, AT, DIRECTION)
