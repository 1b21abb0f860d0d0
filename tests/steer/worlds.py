"""A tiny model and dictionaries for it."""

from typing import Any

import torch

from sae_dist.model.config import ModelConfig
from sae_dist.model.load import load
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters

LANGUAGE_MODEL = load(ModelConfig(name="tiny-llama", dtype="float32", device="cpu"))
MODEL: Any = LANGUAGE_MODEL.model  # transformers types its methods too loosely
TOKENS = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))
N, D, K = 64, 32, 4


def random_dictionary(hook: str, target: str | None = None, *, d_in: int = D, variant: str = "topk") -> Dictionary:
    """Reads `hook` and rebuilds `target`, or what it reads; its decoder is not its encoder transposed."""
    g = torch.Generator().manual_seed(1)
    parameters = Parameters(
        torch.randn(d_in, N, generator=g), torch.randn(N, D, generator=g) / D**0.5,
        torch.randn(N, generator=g) / 10, torch.randn(D, generator=g) / 10,
    )  # fmt: skip
    info = {"variant": variant, "hook": hook, "model": "tiny-llama"} | ({"target_hook": target} if target else {})
    return Dictionary(parameters=parameters, k=K, info=info, b_in=torch.zeros(d_in) if target else None)


def dense(dictionary: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """All latents of x [..., d_in]."""
    active = dictionary.encode(x.flatten(0, -2))
    out = torch.zeros(x[..., 0].numel(), N)
    out[active.rows, active.indices] = active.values
    return out.view(*x.shape[:-1], N)
