"""Warm start: a training begins from a finished dictionary, of ours or an imported one, instead of at random.

What rows are scaled by here is undone in its tensors, so that before step 0 it rebuilds raw rows as it did. Where
decoder rows are kept at norm 1, the encoder makes up for it. Moments, counters, schedules and the rate begin anew.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.sae import find
from sae_dist.sae.dictionary import WEIGHTS, Dictionary
from sae_dist.sae.initialize import random_rows
from sae_dist.sae.scale import Scales
from sae_dist.sae.variants.interface import W_SKIP, Above, Elementwise, own_vectors, spec_of
from sae_dist.shards.hooks import Hooks, said_by
from sae_dist.train.checkpoint_folders import folders
from sae_dist.train.members import MAIN, Member
from sae_dist.train.parallel.collectives import all_gather
from sae_dist.train.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

SPREAD = 1.001  # of the norms of decoder rows, from which on setting them to 1 may change which latents are largest

NO_THRESHOLD = 1e-30  # what is active above it is active above 0


class StartedFrom(NamedTuple):
    """The dictionary that a training began from, for the config.json of its own."""

    dictionary: str  # where it lay
    weights: str  # the hash of its weights


class WarmStart(NamedTuple):
    """This rank's part of a dictionary's initial tensors, for scaled rows."""

    tensors: dict[str, Tensor]
    started_from: StartedFrom


def check_starts(members: Sequence[Member], checkpoints: str | Path) -> None:
    """UserError where a dictionary to begin from is not there; a run that has checkpoints goes on from those."""
    wanted = [member for member in members if member.start_from is not None]
    if wanted and not folders(storage.open(checkpoints)):
        for member in wanted:
            if not find.is_there(str(member.start_from)):
                raise UserError(f"{_named(member)}: no dictionary is there; give a run's folder, or a dictionary's own")


def warm_start(
    member: Member, mesh: Mesh, scales: Scales, *, sides: Sequence[Mapping[str, int]], model: str
) -> WarmStart:
    """What the member begins with; all ranks call this together.

    `sides` are the widths of the hook points, and `model` the model, of the rows that it will learn from. UserError
    where the dictionary does not fit; a warning where it fits, but was made for something else.
    """
    where = str(member.start_from)
    found = find.load(where, mesh.latents)
    if wrong := _misfit(found, member, sides):
        raise UserError(f"{_named(member)}: {wrong}")
    tensors, norms = _tensors(found, member, mesh, scales)
    spread, threshold = _extremes(found, norms, mesh)
    if wrong := _lack(found, member, threshold):
        raise UserError(f"{_named(member)}: {wrong}")
    if mesh.is_rank_0:
        for line in _differences(found, member, sides, model, spread):
            logger.warning("%s: %s", _named(member), line)
    return WarmStart(tensors, StartedFrom(where, found.info[WEIGHTS]))


def _tensors(
    found: Dictionary, member: Member, mesh: Mesh, scales: Scales
) -> tuple[dict[str, Tensor], Float[Tensor, " n_latents"]]:
    """The tensors, and the norms that decoder rows had where these are kept at norm 1."""
    sae, own, rows = member.sae, found.parameters._asdict() | found.more, dict[str, Tensor]()
    for spec in member.tensors:
        if spec.name in own and spec.role != "tracked":  # what is tracked is that of the first batch, after it
            tensor = own[spec.name]
            rows[spec.name] = spec.unfolded(tensor.t() if spec.stored_transposed else tensor, scales)
    norms = torch.ones(found.n_latents)
    if spec_of(sae, "W_dec").unit:
        norms = rows["W_dec"].double().norm(dim=1).float()
        latents = mesh.latents(sae.n_latents)
        some = random_rows("W_dec", latents, width=rows["W_dec"].shape[1], seed=member.seed)  # of a silent latent
        rows["W_dec"] = torch.where(norms[:, None] > 0, rows["W_dec"] / norms[:, None], some)
        for spec in member.tensors:
            if spec.name in rows and spec.per_latent and spec.units in ("z", "z / x"):
                rows[spec.name] = (rows[spec.name].t() * norms).t()
    if isinstance(sae, Elementwise):  # a vector that finished dictionaries do not have
        rows = {name: torch.full((found.n_latents,), value) for name, value in sae.start(0.0).items()} | rows
    if member.skip and W_SKIP.name not in rows:
        rows[W_SKIP.name] = torch.zeros(found.sizes.d_in, found.sizes.d_out)
    stored = {spec.name: spec.stored_transposed for spec in member.tensors}
    return {name: tensor.t() if stored[name] else tensor for name, tensor in rows.items()}, norms


def _misfit(found: Dictionary, member: Member, sides: Sequence[Mapping[str, int]]) -> str | None:
    """Why the dictionary cannot be what is trained here, with the cure; None if it can be."""
    info, there = found.info, said_by(found.info)
    if (n_latents := info["n_latents"]) != member.sae.n_latents:
        return f"it has {n_latents} latents, not sae.n_latents={member.sae.n_latents}; set sae.n_latents={n_latents}"
    if found.b_in is not None and not member.transcodes:
        return f"it is a transcoder ({there}); set target_hook, or take a dictionary that rebuilds what it reads"
    if found.b_in is None and member.transcodes:
        return f"it rebuilds what it reads ({there}); take a transcoder, or set target_hook=null"
    if found.W_skip is not None and not member.skip:
        return "it has a skip connection; set train.skip=true"
    if (crosses := bool(info.get("cross_layer"))) != member.cross_layer:
        return f"it was trained with train.cross_layer={str(crosses).lower()}; set that here too"
    own = [[site["width"] for site in info.get(key, [])] for key in ("sites", "target_sites")]
    widths = [own[0] or [found.sizes.d_in], own[1] or [found.sizes.d_out]][: len(sides)]
    if widths != (wanted := [list(side.values()) for side in sides]):
        return f"it is for rows of {_joined(widths)} ({there}), not of {_joined(wanted)}; choose what it is for as hook"
    return None


def _joined(widths: Sequence[Sequence[int]]) -> str:
    return " -> ".join("+".join(map(str, side)) for side in widths)


def _lack(found: Dictionary, member: Member, threshold: float) -> str | None:
    """Why the kind that is trained here cannot choose with what the dictionary has, with the cure; None if it can.

    `threshold`: the largest one.
    """
    kind, there = member.sae.kind, found.info["variant"]
    if not isinstance(member.sae.rule, Above):
        return None
    if found.threshold is None:
        return f"sae={kind} needs thresholds, which a dictionary of {there} does not have; use sae={there}"
    if threshold > NO_THRESHOLD and not any(spec.name == "threshold" for spec in own_vectors(member.sae)):
        return (
            f"its thresholds reach {threshold:.3g}, and of sae={kind} all are 0, so that far more latents would be "
            f"active; use sae={there}, or sae=jumprelu"
        )
    return None


def _differences(
    found: Dictionary, member: Member, sides: Sequence[Mapping[str, int]], model: str, spread: float
) -> Iterator[str]:
    """What is not as it was where the dictionary comes from, a line each."""
    sae, there, here = member.sae, said_by(found.info), Hooks(*(tuple(side) for side in sides))
    of = found.info.get("model", model)
    if (str(there), of) != (str(here), model):
        yield f"it is of {there} of {of}, and learns from {here} of {model}"
    if (found.info["variant"], found.k) != (sae.kind, sae.k):
        yield f"it was {found.info['variant']} with k={found.k}, and goes on as {sae.kind} with k={sae.k}"
    if not isinstance(sae.rule, Above) and spread > SPREAD:
        yield (
            f"its decoder rows have norms up to {spread:.4g} times as large as others, and get norm 1: other latents "
            "may be among the largest of a row"
        )


def _extremes(found: Dictionary, norms: Float[Tensor, " n_latents"], mesh: Mesh) -> tuple[float, float]:
    """The largest norm of all parts over the smallest that is not 0, and the largest threshold."""
    there = torch.where(norms > 0, norms, 1)
    threshold = norms.new_zeros(1) if found.threshold is None else found.threshold
    here = torch.stack([-there.min(), there.max(), threshold.max()])
    least, most, threshold = all_gather(mesh, mesh.control, here, name="warm start").amax(0).tolist()
    return most / -least, threshold


def _named(member: Member) -> str:
    said = f"start_from={member.start_from}"
    return f"train.{said}" if member.name == MAIN else f"more_dictionaries={member.name}: {said}"
