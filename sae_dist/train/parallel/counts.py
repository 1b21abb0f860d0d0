"""What all ranks must know of a step before its update: the loss, active and dead latents, flaws; in one exchange."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_kernels.reference import StepStatistics
from sae_kernels.shard import Shard
from torch import Tensor

from sae_dist.train.parallel.collectives import all_gather, settle_timings
from sae_dist.train.parallel.mesh import Mesh


class StepCounts(NamedTuple):
    """Equal on every rank, except `fired` of the statistics, which is of this rank's latents."""

    statistics: StepStatistics
    dead: list[int]  # latents of each feature rank that are dead once the batch is counted
    flaws: int  # ranks where a gradient is not finite


def fired_rows(
    indices: Int[Tensor, "lines places"], active: Bool[Tensor, "lines places"], *, n_latents: int
) -> Int[Tensor, " n_latents"]:
    """The number of rows on which each latent is active."""
    places = torch.where(active, indices, n_latents).flatten()
    fired = torch.zeros(n_latents + 1, dtype=torch.int64, device=indices.device)
    return fired.scatter_add_(0, places, torch.ones_like(places))[:-1]


def exchange_counts(
    mesh: Mesh, shard: Shard, fired: Int[Tensor, " n_latents"], n_active: Int[Tensor, ""], gradients: Sequence[Tensor],
    squared_errors: Float[Tensor, " 2"], *, tokens: int,
) -> StepCounts:  # fmt: skip
    """The counts of a batch of so many tokens over the whole mesh.

    `squared_errors`: of the reconstruction and of AuxK. The loss is rank 0's, since other numbers of threads may round
    it otherwise.
    """
    dead = ((fired == 0) & (shard.tokens_since_fired + tokens >= shard.dead_after_tokens)).sum()
    flaw = torch.stack([~torch.isfinite(gradient).all() for gradient in gradients]).any()
    counted = torch.stack([n_active, dead, flaw.long()])
    mine = torch.cat([counted, squared_errors.double().view(torch.int64)])
    everybody = all_gather(mesh, mesh.world, mine, name="counts").cpu()  # all at once: a GPU is waited for once
    settle_timings(mesh)
    counts = everybody.tolist()
    parts = counts[: mesh.feature.size]  # of one data rank
    squared_error, aux_squared_error = everybody[0, 3:].contiguous().view(torch.float64).float()
    active = torch.tensor(sum(n for n, *_ in parts))
    return StepCounts(
        StepStatistics(squared_error, aux_squared_error, active, fired),
        dead=[dead for _, dead, *_ in parts], flaws=sum(flaw for _, _, flaw, *_ in counts),
    )  # fmt: skip
