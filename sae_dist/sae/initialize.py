"""Parameters before step 0, from a seed and a sample of the (scaled) activations."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.sae.blocks import Blocks

BLOCK = 1024  # latents whose initial decoder rows come from one random generator
CANDIDATES = 2  # rows of data for each latent, half of which are left out as too much like others


class Parameters(NamedTuple):
    """A dictionary's weights; W_enc is a transposed view of a contiguous [n_latents, d_in] tensor of its own."""

    W_enc: Float[Tensor, "d_in n_latents"]
    W_dec: Float[Tensor, "n_latents d_out"]
    b_enc: Float[Tensor, " n_latents"]
    b_dec: Float[Tensor, " d_out"]


class Initialization(NamedTuple):
    """A dictionary before step 0."""

    parameters: Parameters
    level: float  # in the mean over the sample, k pre-activations of a row are above it
    b_in: Float[Tensor, " d_in"] | None = None  # the centre of x, of a dictionary that rebuilds something else


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


def random_rows(name: str, latents: range, *, width: int, seed: int) -> Float[Tensor, "latents width"]:
    """Random unit rows of the matrix `name` for some latents.

    A row is a function of (name, seed, latent, width), so a rank makes only the rows that it owns.
    """
    draw = lambda generator: torch.randn(BLOCK, width, generator=generator)  # noqa: E731
    rows = torch.cat([torch.empty(0, width), *_by_block(name, latents, seed, draw)])
    return rows.div_(rows.norm(dim=-1, keepdim=True))


def rows_of_data(
    x: Float[Tensor, "rows width"], latents: range, *, n_latents: int, seed: int
) -> Int[Tensor, " latents"]:
    """The row of the sample from which each of some latents begins, a function of (x, seed, n_latents, latent).

    Of two latents that begin alike one stays silent, and rows of language models are often alike. So of CANDIDATES
    times as many rows as there are latents, in an order by chance, those serve that are least like one before them
    (by the largest cosine). No row serves twice before all have served. x is centred.
    """
    order = torch.randperm(len(x), generator=_generator("data", seed, 0))[: CANDIDATES * n_latents].to(x.device)
    unit = torch.nn.functional.normalize(x[order].double(), dim=1)  # fp64: which rows serve is the same on every rank
    likeness = [
        (unit[first : first + BLOCK] @ unit[: first + BLOCK].T).tril(first - 1).amax(1)
        for first in range(0, len(unit), BLOCK)
    ]
    serve = torch.cat(likeness).argsort(stable=True)[:n_latents].sort().values
    return order[serve[torch.arange(latents.start, latents.stop, device=x.device) % len(serve)]]


def _by_block(name: str, latents: range, seed: int, draw: Callable[[torch.Generator], Tensor]) -> Iterator[Tensor]:
    """What `draw` gives for the latents of each block of 1,024, which has a generator of its own."""
    for block in range(latents.start // BLOCK, -(-latents.stop // BLOCK)):
        first = block * BLOCK
        yield draw(_generator(name, seed, block))[max(latents.start - first, 0) : latents.stop - first]


def _generator(name: str, seed: int, block: int) -> torch.Generator:
    key = hashlib.blake2b(f"{name} {seed} {block}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(key, "little", signed=True))


def _blended(
    rows: Float[Tensor, "latents width"], data: Float[Tensor, "latents width"], *, weight: float
) -> Float[Tensor, "latents width"]:
    """Unit rows between random ones and the directions of data."""
    mixed = weight * torch.nn.functional.normalize(data, dim=1) + (1 - weight) * rows
    return torch.nn.functional.normalize(mixed, dim=1)


def initialize(
    x: Float[Tensor, "rows d_in"],
    *,
    target: Float[Tensor, "rows d_out"] | None = None,
    n_latents: int,
    k: int,
    seed: int,
    latents: range | None = None,
    kth: Callable[[Float[Tensor, "sample candidates"]], Float[Tensor, " sample"]] | None = None,
    total: Callable[[Tensor], Tensor] = lambda part: part,
    norm: float = 1.0,
    data_weight: float = 0.0,
    blocks: Blocks | None = None,
) -> Initialization:
    """Tied initialisation: random unit decoder rows, W_enc = c W_dec^T, b_enc = 0, b_dec = geometric median of x.

    c makes ||x_hat - b_dec|| match ||x - b_dec|| on the sample in the mean (Gao et al. 2024, App. A.1): a dictionary
    that starts at the right size loses fewer latents in the first steps. b_dec from data before step 0 matters more
    than all else: activations far from the origin leave most latents of a zero-centred encoder silent for ever.
    With a `target`, other rows that are to be rebuilt from x, nothing can be tied: W_enc has random rows of its own, c
    matches ||target - b_dec||, and each side is centred by its own geometric median.

    `latents` selects a part of the dictionary, with the same values as in the whole. For a part, `kth` maps each sample
    row's largest values to the k-th largest over all parts, and `total` sums a tensor over all parts.
    Decoder rows get that `norm`, and the encoder what makes up for it. With a `data_weight` p, the direction of a row
    is p times that of a row of the sample, centred, + 1 - p times a random one (Circuits Update, October 2025).
    With `blocks`, rows have norm 1 in what their latents read and write, and are 0 elsewhere.
    """
    latents, wanted = range(n_latents) if latents is None else latents, x if target is None else target
    # The same rows on every device.
    W_dec = random_rows("W_dec", latents, width=wanted.shape[1], seed=seed).to(x.device)
    enc = W_dec if target is None else random_rows("W_enc", latents, width=x.shape[1], seed=seed).to(x.device)
    b_dec = geometric_median(wanted)
    b_in = b_dec if target is None else geometric_median(x)
    if data_weight:
        of_data = rows_of_data(x - b_in, latents, n_latents=n_latents, seed=seed)
        W_dec = _blended(W_dec, wanted[of_data] - b_dec, weight=data_weight)
        enc = W_dec if target is None else _blended(enc, x[of_data] - b_in, weight=data_weight)
    if blocks is not None:
        numbers = torch.arange(latents.start, latents.stop, device=x.device)
        enc = torch.nn.functional.normalize(blocks.enc_(enc.clone(), numbers), dim=1)
        W_dec = torch.nn.functional.normalize(blocks.dec_(W_dec.clone(), numbers), dim=1)
    every = slice(None, None, max(len(x) // 512, 1))
    sample = (x[every] - b_in).double()  # the ratio of two mean norms: 512 rows give it to a few per cent
    size = (wanted[every] - b_dec).double().norm(dim=-1).mean()
    best = sample.new_empty(len(sample), 0)  # in fp64, so that c in fp32 does not show how latents are parted
    for tile in enc.split(BLOCK):
        values = (sample @ tile.double().T).relu()
        best = torch.cat([best, values], 1)
        best = best.topk(min(k, best.shape[1])).values
    least = best[:, -1] if kth is None else kth(best)
    rebuilt = sample.new_zeros(len(sample), wanted.shape[1])
    for tile, rows in zip(enc.split(BLOCK), W_dec.split(BLOCK), strict=True):
        values = (sample @ tile.double().T).relu()
        rebuilt += torch.where(values >= least[:, None], values, 0.0) @ rows.double()
    rebuilt = total(rebuilt)
    c = float(size / rebuilt.norm(dim=-1).mean().clamp_min(1e-12))
    c /= norm
    parameters = Parameters((enc * c).clone().T, W_dec * norm, torch.zeros(len(latents), device=x.device), b_dec)
    return Initialization(parameters, c * float(least.mean()), None if target is None else b_in)
