"""Which latents of one dictionary fire together."""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from sae_dist.comparison.activations import Activations
from sae_dist.comparison.correlation import NONE, blocks, correlation, pair_sums
from sae_dist.comparison.matching import Nearest, cosines
from sae_dist.progress import logged


def partners(
    own: Activations, directions: Float[Tensor, "n_latents d_out"], *, kept: int,
    order: Int[np.ndarray, " rows"] | None = None, said: str = "correlated",
) -> Nearest:  # fmt: skip
    """For each latent the others whose activations are most correlated with its own.

    The other figures of a pair are its Jaccard index, rows on which both are active over rows on which one is, and the
    cosine of the decoder rows. With `order`, row t meets row order[t]: what chance gives.
    """
    n, firings, norms = own.n_latents, own.firings.double(), directions.norm(dim=1)
    found = Nearest(n, kept=min(kept, n), figures=2)
    parts = blocks(n, n)
    for latents in logged(parts, said, len(parts), of=f"times {len(parts[0]):,} latents"):
        here = slice(latents.start, latents.stop)
        r = correlation(own, own, latents, order).float()
        r.diagonal(offset=latents.start).fill_(NONE)  # a latent is not its own partner
        both = pair_sums(own, own, latents, order, count=True)
        jaccard = both / (firings[here, None] + firings - both).clamp_(min=1)
        r[both == 0] = NONE
        found.offer(
            range(latents.start, latents.stop), r, [jaccard, cosines(directions[here], directions, norms)], first=0
        )
    return found


def by_chance(own: Activations, directions: Float[Tensor, "n_latents d_out"], *, seed: int) -> Nearest:
    """`partners` with the rows of one side shuffled."""
    order = np.random.default_rng(seed).permutation(own.rows)
    return partners(own, directions, kept=1, order=order, said="by chance: correlated")
