"""Parameters before step 0, from a seed and a sample of the (scaled) activations."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Parameters(NamedTuple):
    """A dictionary's weights; W_enc is a transposed view of a contiguous [n_latents, d_model] tensor of its own."""

    W_enc: Float[Tensor, "d_model n_latents"]
    W_dec: Float[Tensor, "n_latents d_model"]
    b_enc: Float[Tensor, " n_latents"]
    b_dec: Float[Tensor, " d_model"]


def geometric_median(
    x: Float[Tensor, "rows d_model"], *, iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d_model"]:
    """The point with the least sum of distances to the rows (b_dec before step 0; Bricken et al. 2023).

    Weiszfeld's iteration y <- sum(x_i / ||x_i - y||) / sum(1 / ||x_i - y||), in fp64.
    """
    points = x.double()
    y = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - y).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = (weights * points).sum(0) / weights.sum()
        if (moved - y).norm() <= tolerance * y.norm().clamp_min(1e-12):
            y = moved
            break
        y = moved
    return y.to(x.dtype)


def initialize(x: Float[Tensor, "rows d_model"], *, n_latents: int, k: int, seed: int) -> Parameters:
    """Tied initialisation: random unit decoder rows, W_enc = c W_dec^T, b_enc = 0, b_dec = geometric median of x.

    c makes ||x_hat - b_dec|| match ||x - b_dec|| on the sample in the mean (Gao et al. 2024, App. A.1): a dictionary
    that starts at the right size loses fewer latents in the first steps. b_dec from data before step 0 matters more
    than all else: activations far from the origin leave most latents of a zero-centred encoder silent for ever.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    W_dec = torch.randn(n_latents, x.shape[1], generator=generator)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    b_dec = geometric_median(x)
    centred = x - b_dec
    sample = centred[:: max(len(centred) // 512, 1)]  # the ratio of two mean norms: 512 rows give it to a few per cent
    values, indices = (sample @ W_dec.T).relu().topk(k, dim=-1)
    rebuilt = torch.einsum("bk,bkd->bd", values, W_dec[indices])
    c = float(sample.norm(dim=-1).mean() / rebuilt.norm(dim=-1).mean().clamp_min(1e-12))
    return Parameters((W_dec * c).clone().T, W_dec, torch.zeros(n_latents), b_dec)
