"""Clamps of latents: what a user writes, the values that it means, and the change of an activation that follows."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from sae_kernels import Active
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.sae.dictionary import Dictionary
from sae_dist.steer.activity import Activity

_MULTIPLE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))\s*x")
_CURE = "give a value (2.5; 0 is zero ablation), a multiple of the latent's maximum (10x), or mean"

Target = float | str  # 2.5, "10x" or "mean"


class Clamps(NamedTuple):
    """The values that latents are held at."""

    latents: Int[Tensor, " m"]
    values: Float[Tensor, " m"]


def resolve(clamp: Mapping[int, Target], dictionary: Dictionary, activity: Activity | None = None) -> Clamps:
    """The clamps that a user wrote as {latent: target}; UserError for a latent or a target that there is not.

    Multiples and means need the latents' `activity`.
    """
    check_latents("clamp", clamp, dictionary)
    values = [_value(latent, target, activity) for latent, target in clamp.items()]
    return Clamps(torch.tensor(list(clamp), dtype=torch.int64), torch.tensor(values, dtype=torch.float32))


def check_latents(key: str, latents: Iterable[int], dictionary: Dictionary) -> None:
    """UserError for a latent that there is not; `key` is where a user named it."""
    for latent in latents:
        if not 0 <= latent < dictionary.n_latents:
            raise UserError(
                f"{key} has latent {latent}, but the dictionary has {dictionary.n_latents:,} latents; "
                f"give a number from 0 to {dictionary.n_latents - 1}"
            )


def _value(latent: int, target: Target, activity: Activity | None) -> float:
    if not isinstance(target, str):
        return float(target)
    multiple = _MULTIPLE.fullmatch(target.strip())
    if multiple is None and target != "mean":
        raise UserError(f"clamp={{{latent}: {target}}} is not understood; {_CURE}")
    if activity is None:
        raise UserError(
            f"clamp={{{latent}: {target}}} needs to know how active the latent is; give run=, the folder of a run with "
            "feature pages, or a value"
        )
    if multiple is None:
        return float(activity.mean[latent])
    if (maximum := float(activity.maximum[latent])) == 0:
        raise UserError(
            f"clamp={{{latent}: {target}}} is a multiple of 0: latent {latent} was never active on {activity.source}; "
            "choose another latent, or give a value"
        )
    return float(multiple[1]) * maximum


def values_of(active: Active, latents: Int[Tensor, " m"]) -> Float[Tensor, "rows m"]:
    """What each row's latents of these numbers are worth; 0 where they are silent."""
    pair, which = (active.indices[:, None] == latents.to(active.indices.device)).nonzero(as_tuple=True)
    found = active.values.new_zeros(len(active.offsets) - 1, len(latents))
    found[active.rows[pair], which] = active.values[pair]
    return found


def change(active: Active, clamps: Clamps, W_dec: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "rows d_out"]:
    """decode(clamped latents) - decode(latents): only the clamped ones differ, so nothing else is summed."""
    latents, values = (part.to(W_dec.device) for part in clamps)
    return (values - values_of(active, latents)) @ W_dec[latents]
