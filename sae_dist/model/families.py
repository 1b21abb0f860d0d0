"""Which modules of each architecture the hook points name: the only table of model families.

With `x` the residual stream entering layer L and `x'` the one leaving it:

| hook point     | what it is                                                                                      |
|----------------|-------------------------------------------------------------------------------------------------|
| `resid_pre.L`  | `x`, the input of layer L (`resid_pre.0` is the embedding, scaled as the model scales it)       |
| `attn_out.L`   | what attention adds to the stream: after its output projection and, where there is one, the norm |
| `mlp_act.L`    | the MLP's hidden activations: the input of its down projection (not in a mixture of experts)    |
| `mlp_out.L`    | what the MLP adds to the stream: after its down projection and, where there is one, the norm    |
| `resid_post.L` | `x' = x + attn_out.L + mlp_out.L`, the output of layer L, before any final norm                 |

The last line holds for every family below, sequential (Llama, GPT-2) or parallel (GPT-NeoX, Phi, Cohere);
`resid_post.L` is `resid_pre.L+1`. One exception is known: OPT-350m normalises the stream itself after each addition.
Where a family scales what it adds (Granite) or adds inside its modules (BLOOM), only the ends of layers have names.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel


class LayerPaths(NamedTuple):
    """Paths inside one layer: the modules whose output is attn_out and mlp_out, and the one whose input is mlp_act."""

    attn_out: str
    mlp_out: str
    mlp_act: str | None  # None: experts that a token is sent to have activations of their own
    heads: str  # the projection whose input is all heads of attention side by side


_LLAMA = LayerPaths(attn_out="self_attn", mlp_out="mlp", mlp_act="mlp.down_proj", heads="self_attn.o_proj")
_EXPERTS = LayerPaths(attn_out="self_attn", mlp_out="mlp", mlp_act=None, heads="self_attn.o_proj")
_GPT_J = LayerPaths(attn_out="attn", mlp_out="mlp", mlp_act="mlp.fc_out", heads="attn.out_proj")
_POST_NORM = LayerPaths(
    attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", mlp_act="mlp.down_proj",
    heads="self_attn.o_proj",
)  # fmt: skip

FAMILIES: Mapping[str, LayerPaths] = {  # by `model_type`; a test checks the identity above for each
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "olmo", "smollm3", "glm", "stablelm", "helium",
            "nemotron", "ernie4_5", "seed_oss", "apertus", "cohere", "cohere2",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"), _EXPERTS),
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "exaone4": _POST_NORM,
    "glm4": LayerPaths("post_self_attn_layernorm", "post_mlp_layernorm", "mlp.down_proj", "self_attn.o_proj"),
    "gpt2": LayerPaths(attn_out="attn", mlp_out="mlp", mlp_act="mlp.c_proj", heads="attn.c_proj"),
    "gpt_neo": LayerPaths("attn", "mlp", mlp_act="mlp.c_proj", heads="attn.attention.out_proj"),
    "gptj": _GPT_J,
    "codegen": _GPT_J,
    "starcoder2": LayerPaths("self_attn", "mlp", mlp_act="mlp.c_proj", heads="self_attn.o_proj"),
    "persimmon": LayerPaths("self_attn", "mlp", mlp_act="mlp.dense_4h_to_h", heads="self_attn.dense"),
    "gpt_neox": LayerPaths("attention", "mlp", mlp_act="mlp.dense_4h_to_h", heads="attention.dense"),
    "phi": LayerPaths("self_attn", "mlp", mlp_act="mlp.fc2", heads="self_attn.dense"),
    "opt": LayerPaths("self_attn", "fc2", mlp_act="fc2", heads="self_attn.out_proj"),
}  # fmt: skip


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The language model without its unembedding (of a multimodal model, the text part)."""
    return model.get_decoder()


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the residual stream; empty for a family in which they cannot be identified.

    They are the decoder's only list of `num_hidden_layers` modules that is not inside another list.
    """
    stack = _stack(model)
    return [] if stack is None else list(stack[1])


def around_layers(model: PreTrainedModel) -> nn.Module:
    """The module that contains the layers and the final norm; the decoder where the layers are not known."""
    stack = _stack(model)
    return decoder(model) if stack is None else stack[0]


def layer_paths(model: PreTrainedModel) -> LayerPaths | None:
    """The paths inside the model's layers; None for a family that is not in the table."""
    return FAMILIES.get(decoder(model).config.model_type)


def _stack(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList] | None:
    """The list of layers and the module that contains it."""
    body = decoder(model)
    n_layers = getattr(body.config, "num_hidden_layers", None)
    found = [(parent, own) for parent, own in _outer_lists(body) if len(own) == n_layers]
    return found[0] if len(found) == 1 else None


def _outer_lists(module: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield module, child
        else:
            yield from _outer_lists(child)
