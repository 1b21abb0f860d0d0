"""How much of a dictionary is learned, and how much of that another seed finds again: comparisons with twins.

A latent is found again where a latent of the twin has the same direction, in the decoder and in the encoder (cosines
of 0.7 or more), and each is the other's nearest by the mean of both cosines. So a latent is matched once. (Paulo &
Belrose 2025 match by the Hungarian algorithm, which needs n_latents^2 numbers at once; this needs a block of them.)
Only latents that were active on held-out rows count.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.evaluate.metrics import Metrics
from sae_dist.sae.dictionary import Dictionary

SAME = 0.7  # cosine (Paulo & Belrose 2025)
BLOCK = 2048  # latents compared at once


class Match(NamedTuple):
    """Shares of a dictionary's live latents."""

    shared: float  # found again in the twin
    shared_decoder: float  # whose direction alone is, by the largest cosine with any decoder row of the twin
    mean_cosine: float  # of decoder rows with their nearest in the twin


def match(
    ours: Dictionary, theirs: Dictionary, *, alive: Int[Tensor, " alive"], their_alive: Int[Tensor, " their_alive"]
) -> Match:
    """How much of `ours` is in `theirs`; numbers of the latents that count of each."""
    dec, enc = _directions(ours, alive)
    their_dec, their_enc = _directions(theirs, their_alive)
    if not len(dec) or not len(their_dec):
        return Match(0.0, 0.0, 0.0)
    n, their_n = len(dec), len(their_dec)
    nearest = torch.empty(n, dtype=torch.int64)
    cosine = torch.empty(n)
    their_best, their_nearest = torch.full((their_n,), -2.0), torch.zeros(their_n, dtype=torch.int64)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        of_decoder = dec[rows] @ their_dec.T
        mean = (of_decoder + enc[rows] @ their_enc.T) / 2
        cosine[rows] = of_decoder.max(1).values
        nearest[rows] = mean.argmax(1)
        of_block, where = mean.max(0)
        closer = of_block > their_best
        their_best[closer], their_nearest[closer] = of_block[closer], where[closer] + start
    mutual = their_nearest[nearest] == torch.arange(n)
    both = torch.minimum((dec * their_dec[nearest]).sum(1), (enc * their_enc[nearest]).sum(1)) >= SAME
    return Match(float((mutual & both).double().mean()), float((cosine >= SAME).double().mean()), float(cosine.mean()))


def compare(
    ours: Dictionary, theirs: Dictionary, x: Float[Tensor, "rows d_in"] | None, *, main: Metrics, twin: Metrics
) -> dict[str, Any]:
    """What summary.json says of a twin: its match and the gaps in the figures `main` and `twin`.

    `x`: held-out rows; None: there are none, and all latents count.
    """
    alive = [_alive(dictionary, x) for dictionary in (ours, theirs)]
    return match(ours, theirs, alive=alive[0], their_alive=alive[1])._asdict() | {"gaps": gaps(main, twin)}


def _alive(dictionary: Dictionary, x: Float[Tensor, "rows d_in"] | None) -> Int[Tensor, " alive"]:
    return torch.arange(dictionary.n_latents) if x is None else dictionary.encode(x).indices.unique()


def gaps(main: Metrics, twin: Metrics) -> dict[str, float]:
    """The main dictionary's figures less the twin's, of those that both have."""
    names = ("fvu", "l0", "dead_fraction", "loss_recovered")
    both = {name: (main.get(name), twin.get(name)) for name in names}
    return {name: ours - theirs for name, (ours, theirs) in both.items() if ours is not None and theirs is not None}


def _directions(
    dictionary: Dictionary, alive: Int[Tensor, " alive"]
) -> tuple[Float[Tensor, "alive d_out"], Float[Tensor, "alive d_in"]]:
    decoder, encoder = dictionary.parameters.W_dec[alive], dictionary.parameters.W_enc.T[alive]
    return torch.nn.functional.normalize(decoder, dim=1), torch.nn.functional.normalize(encoder, dim=1)
