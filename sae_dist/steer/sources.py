"""What a latent reads: which tokens attention brings it from, and what was there already, as far as one layer."""

import re
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.model.attention import moved_along
from sae_dist.model.load import LanguageModel
from sae_dist.sae.dictionary import Dictionary

_READS = re.compile(r"(resid_pre|attn_out|resid_post)\.(\d+)")


class Read(NamedTuple):
    """Terms of the pre-activation of a latent at one position; they sum to it."""

    layer: int  # whose attention it is
    stream: float | None  # in the residual stream before that layer; None of a dictionary that reads attn_out
    mlp: float | None  # that the layer's MLP adds
    bias: float  # of the latent and of attention, less the dictionary's centre
    heads: Float[Tensor, "heads context"]  # from each token, through each head of attention

    @property
    def pre_activation(self) -> float:
        return (self.stream or 0) + (self.mlp or 0) + self.bias + float(self.heads.sum())


def layer_read(hook: str) -> tuple[str, int]:
    """The kind of a hook point, and the layer whose attention is the last before it; UserError where there is none."""
    found = _READS.fullmatch(hook)
    layer = -1 if found is None else int(found[2]) - (found[1] == "resid_pre")
    if found is None or layer < 0:
        raise UserError(
            "sources= is known of dictionaries that read attn_out, resid_post or, of a later layer, resid_pre; this "
            f"one reads {hook}"
        )
    return found[1], layer


def read(
    language_model: LanguageModel, dictionary: Dictionary, hook: str, tokens: Int[Tensor, " context"], position: int,
    latent: int,
) -> Read:  # fmt: skip
    """What makes the pre-activation of `latent` at `position` what it is; UserError as `layer_read`, `moved_along`."""
    kind, layer = layer_read(hook)
    names = [hook, *([] if kind == "attn_out" else [f"resid_pre.{layer}", f"mlp_out.{layer}"])]
    W_enc, _, b_enc, b_dec = dictionary.parameters
    direction, centre = W_enc[:, latent], b_dec if dictionary.b_in is None else dictionary.b_in
    states = {name: x[0, position].float() for name, x in language_model.capture(tokens[None], names).items()}
    x, *others = (float(states[name] @ direction) for name in names)
    heads = moved_along(language_model.model, tokens, layer, position, direction)
    stream, mlp = others or (None, None)
    total = x - float(centre @ direction) + float(b_enc[latent])
    bias = total - (stream or 0) - (mlp or 0) - float(heads.sum())
    return Read(layer, stream, mlp, bias, heads)
