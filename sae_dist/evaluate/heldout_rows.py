"""Evaluates dictionaries on the store's held-out units, without the language model.

All dictionaries of a hook point are evaluated together: rows are read once.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.metrics import RECONSTRUCTION, Metrics, measured, unmeasured
from sae_dist.evaluate.reconstruction import is_constant, reconstruction
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.metrics import ReconstructionSums, figures
from sae_dist.shards.hooks import Hooks, widths
from sae_dist.shards.reader import Store, heldout_pairs


def evaluate_reconstruction(
    dictionaries: Sequence[Dictionary], store: Store, hooks: Hooks, config: EvaluateConfig
) -> list[Metrics]:
    """Each one's figures that need no model: FVU, L0, cosine and dead share on the units that training never reads.

    FVU and cosine are those of what is rebuilt: of a transcoder, the rows of its target. Of several hook points they
    are means, by width, and `fvu_by_hook` has the FVU of each.
    """
    if not store.meta.heldout_units:
        return [unmeasured(RECONSTRUCTION, "the store has no held-out units")] * len(dictionaries)
    rebuilt = widths(store.meta, hooks.sides[-1])
    totals = reconstruction(
        dictionaries, heldout_pairs(store, hooks, config.batch_rows), widths=tuple(rebuilt.values())
    )
    if totals is None:
        none = unmeasured(RECONSTRUCTION, "the held-out units have no rows that are finite") | {"tokens": 0}
        return [none] * len(dictionaries)
    return [reconstruction_figures(total, tuple(rebuilt)) for total in totals]


def reconstruction_figures(total: ReconstructionSums, hooks: Sequence[str] = ()) -> Metrics:
    """What the sums over the rows of these hook points say, by name; null with a reason where all rows are the same."""
    found, constant = figures(total), is_constant(total)
    of_sites = {}
    if len(hooks) > 1:
        finite = [fvu if math.isfinite(fvu) else None for fvu in found.fvu_of_sites]
        of_sites["fvu_by_hook"] = dict(zip(hooks, finite, strict=True))
    return measured(
        {
            "tokens": found.tokens,
            "fvu": None if constant else found.fvu,
            "l0": found.l0,
            "dead_fraction": found.dead_fraction,
            "cosine": found.cosine,
            "density_quantiles": density_quantiles(found.density),
            **of_sites,
        },
        {
            "fvu": f"the {found.tokens} held-out rows are all the same"
            if constant
            else "the reconstruction is not finite"
        },
    )


def density_quantiles(density: Float[Tensor, " n_latents"]) -> dict[str, float]:
    """Quantiles over the latents of the share of rows on which each is active."""
    points = (0.01, 0.1, 0.5, 0.9, 0.99)
    values = np.quantile(density.numpy(), points)  # torch.quantile stops at 16M latents
    return {f"{point:g}": float(value) for point, value in zip(points, values, strict=True)}
