"""How well a dictionary rebuilds rows that training never read."""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.metrics import Reconstruction, ReconstructionSums, figures, sums


def reconstruction(dictionary: Dictionary, batches: Iterable[Float[Tensor, "_ d_model"]]) -> Reconstruction:
    """FVU, L0, cosine, dead share and densities over all rows of `batches`."""
    total: ReconstructionSums | None = None
    for x in batches:
        x = x.float()
        active = dictionary.encode(x)
        part = sums(x, dictionary.decode(active), active=active.indices, n_latents=dictionary.n_latents)
        total = part if total is None else total + part
    assert total is not None, "no held-out rows"
    return figures(total)
