"""Dead latents begin anew at rows that are badly rebuilt (Bricken et al. 2023, App. "Neuron resampling").

A latent is dead once it has been silent for `sae.dead_after_tokens`. Each gets a row of the batch, drawn with a chance
proportional to its squared error, squared: the decoder row has that row's direction, the encoder the same at 0.2 of the
mean norm of the living, the bias is 0 and the moments are those of before the first step. Learned thresholds, which the
paper has not, are 0.2 of the mean of the living too, so that the shorter encoder row still exceeds them. The paper
draws from 819,200 inputs; here it is the batch at hand, which every rank has.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist.sae.variants.interface import own_vectors
from sae_dist.train.parallel.collectives import ordered_sum
from sae_dist.train.parallel.step import MeshStep

ENCODER = 0.2  # of the mean norm of living encoder rows, and of their thresholds


def resample_(
    step: MeshStep, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], *, seed: int
) -> int:
    """Lets all dead latents of the whole mesh begin anew, after an update; returns their number.

    x and target are those of the last `forward`. All ranks call this together, and draw the same.
    """
    shard, mesh, counts = step.shard, step.mesh, step.dead_by_rank()
    n_dead, dead = sum(counts), shard.dead.nonzero().squeeze(1)
    if not n_dead or step.errors is None:
        return 0
    enc_norm, dec_norm = (_mean_norm(step, rows) for rows in (shard.W_enc.t(), shard.W_dec))
    own = {
        spec.name: (ENCODER if spec.units == "z" else 1.0) * _mean(step, shard.vectors[spec.name])
        for spec in own_vectors(step.sae)
    }
    chance = step.errors.double().square().sum(1).square().cpu()
    if not bool(chance.any()):  # nothing is left to learn
        return 0
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shard.steps)
    few = int(chance.count_nonzero())
    drawn = torch.multinomial(chance, n_dead, replacement=n_dead > few, generator=generator)
    before = sum(counts[: mesh.feature.rank])
    mine = drawn[before : before + len(dead)].to(x.device)
    target = target if step.skip is None else target - step.skip.of(x)
    centre = shard.b_dec if shard.b_in is None else shard.b_in
    enc, dec = x[mine] - centre, target[mine] - shard.b_dec
    if step.blocks is not None:
        numbers = dead + step.latents.start
        enc, dec = step.blocks.enc_(enc, numbers), step.blocks.dec_(dec, numbers)
    enc = torch.nn.functional.normalize(enc, dim=1) * (ENCODER * enc_norm)
    dec = torch.nn.functional.normalize(dec, dim=1) * dec_norm
    step.begin_anew_(dead, enc=enc, dec=dec, vectors=own)
    return n_dead


def _mean_norm(step: MeshStep, rows: Float[Tensor, "n_latents width"]) -> float:
    """Of the living latents' rows, over all parts."""
    return _mean(step, rows.float().norm(dim=1))


def _mean(step: MeshStep, values: Float[Tensor, " n_latents"]) -> float:
    """Over the living latents of all parts."""
    alive = values[~step.shard.dead].double()
    sums = torch.stack([alive.sum(), alive.new_tensor(len(alive))])
    total, count = ordered_sum(step.mesh, step.mesh.feature, sums, name="resample").tolist()
    return total / max(count, 1)
