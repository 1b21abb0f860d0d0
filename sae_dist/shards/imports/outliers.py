"""Leaves out rows with a very large norm, as language models have at the first positions of a sequence.

A few of them would dominate every mean and squared error. The bound is a multiple of the median norm of a sample over
the whole source, because a unit of a sorted file may consist of nothing else.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards.imports.config import ImportConfig
from sae_dist.shards.imports.sources import Source
from sae_dist.shards.imports.unit_plan import sample

SAMPLE_ROWS = 4096


class NormBound(NamedTuple):
    """The largest norm of a row that is kept; infinite if all are."""

    norm: float = float("inf")

    def keeps(self, x: Float[Tensor, "rows width"]) -> Bool[Tensor, " rows"]:
        """Rows within the bound, and those without a finite norm, which the writer counts by themselves."""
        norm = _norms(x)
        return (norm <= self.norm) | ~norm.isfinite()


def norm_bound(source: Source, settings: ImportConfig) -> NormBound:
    """The bound for a source; UserError where it would leave out more than a few rows."""
    if settings.max_norm_ratio is None:
        return NormBound()
    found = sample(source.rows, min(source.rows, SAMPLE_ROWS), settings.seed)
    norms = _norms(source.read(found.cut(0, 1)))
    known = norms[norms.isfinite() & (norms > 0)]  # rows of zeros are padding and would lower the median
    if not len(known):
        return NormBound()
    median = float(known.median())
    beyond = int((known > settings.max_norm_ratio * median).sum())
    if beyond > settings.max_outlier_fraction * len(norms):
        raise UserError(
            f"path={source.path}: {beyond} of {len(norms)} sampled rows are longer than max_norm_ratio="
            f"{settings.max_norm_ratio:g} times the median norm {median:.4g}, more than max_outlier_fraction="
            f"{settings.max_outlier_fraction:g}; raise the ratio (null keeps all rows), or the fraction"
        )
    return NormBound(settings.max_norm_ratio * median)


def _norms(x: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"]:
    """In fp32, some rows at a time."""
    return torch.cat([part.float().norm(dim=1) for part in x.split(SAMPLE_ROWS)])
