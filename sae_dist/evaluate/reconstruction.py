"""How well dictionaries rebuild rows that training never read."""

import logging
from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.metrics import ReconstructionSums, sums

logger = logging.getLogger(__name__)
Pair = tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]
CONSTANT = 1e-12  # share of the squared norms below which a variance is rounding: rows that are all the same


def reconstruction(dictionaries: Sequence[Dictionary], batches: Iterable[Pair]) -> list[ReconstructionSums] | None:
    """The sums behind each dictionary's figures over the finite rows of `batches`: x, and what is to be rebuilt of it.

    None when there are none.
    """
    totals: list[ReconstructionSums] | None = None
    left_out = 0
    for rows, wanted in batches:
        x, target = rows.float(), wanted.float()
        finite = x.isfinite().all(1) & target.isfinite().all(1)
        left_out += int((~finite).sum())
        x, target = x[finite], target[finite]
        if not len(x):
            continue
        parts = [_sums(dictionary, x, target) for dictionary in dictionaries]
        totals = parts if totals is None else [total + part for total, part in zip(totals, parts, strict=True)]
    if left_out:
        logger.warning("%d held-out rows are not finite and are left out of the figures", left_out)
    return totals


def _sums(
    dictionary: Dictionary, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]
) -> ReconstructionSums:
    active = dictionary.encode(x)
    return sums(target, dictionary.decode(active), active=active.indices, n_latents=dictionary.n_latents)


def is_constant(total: ReconstructionSums) -> bool:
    """Whether the rows are all the same (or one), so that there is no variance to explain."""
    variance = total.squared_norm - total.x.square().sum() / total.rows
    return bool(variance <= CONSTANT * total.squared_norm)
