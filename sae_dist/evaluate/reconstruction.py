"""How well dictionaries rebuild rows that training never read."""

import logging
from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.metrics import ReconstructionSums, sums

logger = logging.getLogger(__name__)
CONSTANT = 1e-12  # share of the squared norms below which a variance is rounding: rows that are all the same


def reconstruction(
    dictionaries: Sequence[Dictionary], batches: Iterable[Float[Tensor, "_ d_model"]]
) -> list[ReconstructionSums] | None:
    """The sums behind each dictionary's figures over the finite rows of `batches`; None when there are none."""
    totals: list[ReconstructionSums] | None = None
    left_out = 0
    for rows in batches:
        x = rows.float()
        finite = x.isfinite().all(1)
        left_out += int((~finite).sum())
        x = x[finite]
        if not len(x):
            continue
        parts = [_sums(dictionary, x) for dictionary in dictionaries]
        totals = parts if totals is None else [total + part for total, part in zip(totals, parts, strict=True)]
    if left_out:
        logger.warning("%d held-out rows are not finite and are left out of the figures", left_out)
    return totals


def _sums(dictionary: Dictionary, x: Float[Tensor, "batch d_model"]) -> ReconstructionSums:
    active = dictionary.encode(x)
    return sums(x, dictionary.decode(active), active=active.indices, n_latents=dictionary.n_latents)


def is_constant(total: ReconstructionSums) -> bool:
    """Whether the rows are all the same (or one), so that there is no variance to explain."""
    variance = total.squared_norm - total.x.square().sum() / total.rows
    return bool(variance <= CONSTANT * total.squared_norm)
