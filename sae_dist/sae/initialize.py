"""Parameters before step 0, from a seed and a sample of the (scaled) activations."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 1024  # latents whose initial decoder rows come from one random generator


class Parameters(NamedTuple):
    """A dictionary's weights; W_enc is a transposed view of a contiguous [n_latents, d_model] tensor of its own."""

    W_enc: Float[Tensor, "d_model n_latents"]
    W_dec: Float[Tensor, "n_latents d_model"]
    b_enc: Float[Tensor, " n_latents"]
    b_dec: Float[Tensor, " d_model"]


class Initialization(NamedTuple):
    """A dictionary before step 0."""

    parameters: Parameters
    level: float  # in the mean over the sample, k pre-activations of a row are above it


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


def decoder_rows(latents: range, *, d_model: int, seed: int) -> Float[Tensor, "latents d_model"]:
    """Random unit rows of W_dec for some latents; each block of 1,024 has a generator of its own.

    A row is a function of (seed, latent, d_model), so a rank makes only the rows that it owns.
    """
    parts = [torch.empty(0, d_model)]
    for block in range(latents.start // BLOCK, -(-latents.stop // BLOCK)):
        key = hashlib.blake2b(f"W_dec {seed} {block}".encode(), digest_size=8).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(key, "little", signed=True))
        rows = torch.randn(BLOCK, d_model, generator=generator)
        first = block * BLOCK
        parts.append(rows[max(latents.start - first, 0) : latents.stop - first])
    W_dec = torch.cat(parts)
    return W_dec.div_(W_dec.norm(dim=-1, keepdim=True))


def initialize(
    x: Float[Tensor, "rows d_model"],
    *,
    n_latents: int,
    k: int,
    seed: int,
    latents: range | None = None,
    kth: Callable[[Float[Tensor, "sample candidates"]], Float[Tensor, " sample"]] | None = None,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Initialization:
    """Tied initialisation: random unit decoder rows, W_enc = c W_dec^T, b_enc = 0, b_dec = geometric median of x.

    c makes ||x_hat - b_dec|| match ||x - b_dec|| on the sample in the mean (Gao et al. 2024, App. A.1): a dictionary
    that starts at the right size loses fewer latents in the first steps. b_dec from data before step 0 matters more
    than all else: activations far from the origin leave most latents of a zero-centred encoder silent for ever.

    `latents` selects a part of the dictionary, with the same values as in the whole. For a part, `kth` maps each sample
    row's largest values to the k-th largest over all parts, and `total` sums a tensor over all parts.
    """
    latents = range(n_latents) if latents is None else latents
    W_dec = decoder_rows(latents, d_model=x.shape[1], seed=seed).to(x.device)  # the same rows on every device
    b_dec = geometric_median(x)
    centred = x - b_dec
    sample = centred[:: max(len(centred) // 512, 1)].double()  # the ratio of two mean norms: 512 rows give it to a few
    best = sample.new_empty(len(sample), 0)  # per cent. In fp64, so that c in fp32 does not show how latents are parted
    for tile in W_dec.split(BLOCK):
        values = (sample @ tile.double().T).relu()
        best = torch.cat([best, values], 1)
        best = best.topk(min(k, best.shape[1])).values
    least = best[:, -1] if kth is None else kth(best)
    rebuilt = torch.zeros_like(sample)
    for tile in W_dec.split(BLOCK):
        values = (sample @ tile.double().T).relu()
        rebuilt += torch.where(values >= least[:, None], values, 0.0) @ tile.double()
    rebuilt = total(rebuilt)
    c = float(sample.norm(dim=-1).mean() / rebuilt.norm(dim=-1).mean().clamp_min(1e-12))
    parameters = Parameters((W_dec * c).clone().T, W_dec, torch.zeros(len(latents), device=x.device), b_dec)
    return Initialization(parameters, c * float(least.mean()))
