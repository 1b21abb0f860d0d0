"""The neurons of a hook point as a dictionary: each coordinate of its rows is a latent, of any sign.

Compared with them, latents show whether they are more than single neurons (Bricken et al. 2023).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_kernels import Active
from torch import Tensor

from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.hooks import Hooks, sides, width


@dataclass(frozen=True, kw_only=True)
class Neurons(Dictionary):
    """A neuron is active where it is not 0, and its direction is the coordinate's own."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Active:
        """The active neurons of every row, in their order."""
        there = x != 0
        offsets = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0))
        return Active(x[there].float(), there.nonzero()[:, 1], offsets)


def neurons(hook: str, meta: StoreMeta) -> Neurons:
    """Those of one hook point of a store."""
    hooks = Hooks((hook,))
    d, info = width(meta, hooks.reads), {"variant": "neurons", "model": meta.model} | sides(hooks, meta)
    own = torch.eye(d)
    return Neurons(parameters=Parameters(own, own, torch.zeros(d), torch.zeros(d)), k=None, info=info)
