"""How well dictionaries rebuild rows that training never read."""

import logging
from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.metrics import ReconstructionSums, sums, variance

logger = logging.getLogger(__name__)
Pair = tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]
CONSTANT = 1e-12  # share of the squared norms below which a variance is rounding: rows that are all the same


def reconstruction(
    dictionaries: Sequence[Dictionary], batches: Iterable[Pair], *, widths: Sequence[int] = ()
) -> list[ReconstructionSums] | None:
    """The sums behind each dictionary's figures over the finite rows of `batches`: x, and what is to be rebuilt of it.

    `widths`: of the hook points that are rebuilt side by side. None when there are no rows.
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
        parts = [_sums(dictionary, x, target, widths) for dictionary in dictionaries]
        totals = parts if totals is None else [total + part for total, part in zip(totals, parts, strict=True)]
    if left_out:
        logger.warning("%d held-out rows are not finite and are left out of the figures", left_out)
    return totals


def _sums(
    dictionary: Dictionary, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], widths: Sequence[int]
) -> ReconstructionSums:
    active = dictionary.encode(x)
    rebuilt = dictionary.decode(active, x)
    return sums(target, rebuilt, active=active.indices, n_latents=dictionary.n_latents, widths=widths)


def is_constant(total: ReconstructionSums) -> bool:
    """Whether the rows of a hook point are all the same (or one), so that there is no variance to explain."""
    return bool((variance(total) <= CONSTANT * total.squared_norm).any())
