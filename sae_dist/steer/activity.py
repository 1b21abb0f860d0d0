"""How active each latent is: the maximum and the mean that clamps are given in."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from sae_kernels import Active
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.interpret import site


class Activity(NamedTuple):
    """Of every latent, on the tokens that `source` names."""

    maximum: Float[Tensor, " n_latents"]
    mean: Float[Tensor, " n_latents"]  # over all tokens, also those on which the latent is silent
    source: str


def of_pages(pages: Path) -> Activity:
    """What the feature pages in this folder say of all latents, to four digits."""
    index, rows = site.read(pages, "index"), site.read(pages, "summary")["rows"]
    count, mean = (torch.tensor(index[name], dtype=torch.float64) for name in ("count", "mean"))
    return Activity(
        torch.tensor(index["maximum"], dtype=torch.float32), (mean * count / max(1, rows)).float(),
        f"the {rows:,} training tokens of the run's feature pages",
    )  # fmt: skip


@torch.no_grad()
def of_rows(
    rows: Iterable[Float[Tensor, "rows d_in"]],
    encode: Callable[[Float[Tensor, "rows d_in"]], Active],
    *,
    n_latents: int,
    what: str,
) -> Activity:
    """Measured on rows that `what` names, in one pass."""
    maximum, total, n_rows = torch.zeros(n_latents), torch.zeros(n_latents, dtype=torch.float64), 0
    for x in rows:
        active = encode(x)
        maximum.scatter_reduce_(0, active.indices.cpu(), active.values.float().cpu(), "amax")
        total.index_add_(0, active.indices.cpu(), active.values.double().cpu())
        n_rows += len(x)
    if not n_rows:
        raise UserError(f"there are no {what} to measure latents on; give values in place of multiples in clamp=")
    return Activity(maximum, (total / n_rows).float(), f"{n_rows:,} {what}")
