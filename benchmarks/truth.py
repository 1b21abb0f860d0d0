"""How well a dictionary found the features of a world that is known."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.worlds import Rows, World
from sae_dist.sae.dictionary import Dictionary

RECOVERED = 0.9  # cosine


class Found(NamedTuple):
    """Figures of a dictionary in a world. Shares and means are over true features."""

    fvu: float
    l0: float
    dead: float  # share of latents that are silent on all rows
    mmcs: float  # mean over features of the largest cosine with a decoder row
    recovered: float  # share of features whose largest cosine is 0.9 or more
    f1: float  # of a feature's activity by that of the latent that it is assigned to
    mcc: float  # Matthews correlation of the same
    shrinkage: float  # mean of (what is rebuilt of a feature) / (its strength) where both are active; 1 is right
    fvu_refitted: float  # with the values that are best for the chosen latents
    absorption: float | None  # a parent's recall without a child less that with one; hierarchies only


def judge(dictionary: Dictionary, world: World, rows: Rows) -> Found:
    """The figures on rows that were not trained on."""
    x, strength = rows
    decoder = dictionary.parameters.W_dec
    norms = decoder.norm(dim=1).clamp_min(1e-12)
    cosine = world.directions @ (decoder / norms[:, None]).T
    active = dictionary.encode(x)
    values = torch.zeros(len(x), dictionary.n_latents)
    values[active.rows, active.indices] = active.values
    x_hat, variance = dictionary.decode(active), (x - x.mean(0)).square().sum()
    of_feature = assigned(cosine)
    on, found = strength > 0, (values[:, of_feature] != 0) & (of_feature >= 0)
    both, of_feature = on & found, of_feature.clamp_min(0)
    seen = values[:, of_feature] * norms[of_feature] * cosine[torch.arange(len(on[0])), of_feature]
    ratio = (seen / strength.clamp_min(1e-9))[both]
    best = cosine.max(1).values
    return Found(
        fvu=float((x - x_hat).square().sum() / variance), l0=len(active.values) / len(x),
        dead=float((values != 0).any(0).logical_not().double().mean()), mmcs=float(best.mean()),
        recovered=float((best >= RECOVERED).double().mean()), f1=float(f1(on, found).mean()),
        mcc=float(mcc(on, found).mean()), shrinkage=float(ratio.mean()) if len(ratio) else float("nan"),
        fvu_refitted=float(refitted(dictionary, x, values) / variance),
        absorption=absorption(world, on, values != 0, cosine) if world.parents else None,
    )  # fmt: skip


def assigned(cosine: Float[Tensor, "n_true n_latents"]) -> Int[Tensor, " n_true"]:
    """One latent for each feature, no latent twice, with the largest sum of cosines; -1 where there are too few."""
    feature, latent = linear_sum_assignment(-cosine.numpy())
    out = torch.full((len(cosine),), -1)
    out[torch.from_numpy(feature)] = torch.from_numpy(latent)
    return out


def f1(on: Tensor, found: Tensor) -> Float[Tensor, " n_true"]:
    right = (on & found).sum(0)
    return 2 * right / (on.sum(0) + found.sum(0)).clamp_min(1)


def mcc(on: Tensor, found: Tensor) -> Float[Tensor, " n_true"]:
    """Matthews correlation of two binary columns; 0 where one of them is constant."""
    a, b = on.double(), found.double()
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt().clamp_min(1e-12)


def refitted(dictionary: Dictionary, x: Tensor, values: Tensor, *, rows: int = 500) -> float:
    """The squared error with least-squares values for the chosen latents; of some rows, scaled to all."""
    decoder, left = dictionary.parameters.W_dec.double(), 0.0
    centred = (x - dictionary.parameters.b_dec).double()
    for row in range(min(rows, len(x))):
        chosen = decoder[values[row] != 0]
        if len(chosen):
            fit = torch.linalg.lstsq(chosen.T, centred[row][:, None], driver="gelsd").solution
            left += float((centred[row] - (chosen.T @ fit)[:, 0]).square().sum())
        else:
            left += float(centred[row].square().sum())
    return left * len(x) / min(rows, len(x))


def absorption(world: World, on: Tensor, fires: Tensor, cosine: Tensor) -> float:
    """How much rarer the latents of parents fire where a child is active too (Chanin et al. 2024, in a known world).

    A parent's latent is the one that tells its rows without a child best from all others.
    """
    gaps = []
    for parent, children in world.parents.items():
        with_child = on[:, children].any(1)
        alone, together = on[:, parent] & ~with_child, on[:, parent] & with_child
        likely = cosine[parent].topk(8).indices
        scores = f1((on[:, parent] & ~with_child)[~with_child][:, None], fires[~with_child][:, likely])
        latent = likely[scores.argmax()]
        gaps.append(float(fires[alone, latent].double().mean() - fires[together, latent].double().mean()))
    return sum(gaps) / len(gaps)
