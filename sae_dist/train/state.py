"""The state of a training between two steps. A checkpoint holds all of it."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from sae_kernels.shard import Shard
from torch import Tensor

from sae_dist.config import UserError, load
from sae_dist.sae.blocks import Blocks
from sae_dist.sae.config import resolved_k_aux
from sae_dist.sae.initialize import initialize
from sae_dist.sae.scale import Scale, Scales, latent_scale, scale_of
from sae_dist.sae.variants.interface import W_SKIP, Elementwise, TensorSpec, own_vectors, spec_of
from sae_dist.train import guard as guards
from sae_dist.train.checkpoint import Checkpoint, OwnedRows, RowSelector
from sae_dist.train.checkpoint_identity import identity, refuse_others
from sae_dist.train.checkpoint_manifest import TensorLayout
from sae_dist.train.config import INIT_ROWS, TrainConfig
from sae_dist.train.guard import Guard
from sae_dist.train.learner import Learner
from sae_dist.train.members import Member, split_name
from sae_dist.train.parallel.collectives import all_gather, ordered_sum
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.skip import Skip
from sae_dist.train.parallel.step import MeshStep
from sae_dist.train.warm_start import StartedFrom, warm_start

logger = logging.getLogger(__name__)

MIN_VARIANCE = 1e-9  # of the mean squared norm: below it, rows that are all the same differ by rounding only


class RowSource(NamedTuple):
    """The rows that a checkpoint was trained on; it may resume with no others."""

    store: str  # digest of store.json
    hook: str  # or several: those that are read -> those that are rebuilt
    manifest: int | None  # version that the order is pinned to; None while the store grows
    run: str | None = None  # hash of the run's configuration: tells runs with one checkpoint folder apart


class TrainState(NamedTuple):
    """The state after `step` steps; the same on every rank of a mesh, except that each has its own latents."""

    step: int
    learners: tuple[Learner, ...]  # one per dictionary
    scales: Scales
    variance: float  # mean over rows of ||target - mean||^2, scaled: the loss's constant denominator
    order_hash: int  # of the rows seen
    units_done: int  # units of the first epoch that no later step reads in it
    source: RowSource
    seconds: float  # of training so far, over all attempts


def initial_state(
    x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"] | None, members: Sequence[Member],
    config: TrainConfig, mesh: Mesh, *, source: RowSource, sides: Sequence[Mapping[str, int]], model: str,
) -> TrainState:  # fmt: skip
    """The state before step 0, from a sample of raw rows: scales, variance, this rank's initial parameters.

    `target` is what is to be rebuilt, None: x. `sides`: the widths of the hook points of x, and of the target if there
    is one; `model`: whose they are. UserError where all rows of a hook point are the same, and where a dictionary to
    begin from does not fit.
    """
    scale, variance = _scale(x[: config.scale_rows], sides[0])
    of_target = scale
    if target is not None:
        of_target, variance = _scale(target[: config.scale_rows], sides[-1])
        target = of_target.of(target)
    x, scales = scale.of(x), Scales(scale, of_target, latent_scale(of_target))
    learners = []
    for member in members:
        if member.start_from is not None:
            tensors, started_from = warm_start(member, mesh, scales, sides=sides, model=model)
        else:
            rows = slice(config.rows_to_begin(member.sae.n_latents, stored=len(x)))  # also in a pass with a larger one
            own = None if target is None else target[rows]
            tensors, started_from = _initial(x[rows], own, member, config, mesh, scales), None
        learners.append(Learner(member, _step(tensors, member, config, mesh, scales), Guard(), started_from))
    return TrainState(0, tuple(learners), scales, variance, 0, 0, source, 0.0)


def _scale(x: Float[Tensor, "rows width"], hooks: Mapping[str, int]) -> tuple[Scale, float]:
    """What raw rows of one side are scaled by, and the variance of the scaled ones."""
    widths = tuple(hooks.values())
    for hook, site in zip(hooks, x.split(widths, 1), strict=True):
        spread = (site - site.mean(0)).double().square().sum(-1).mean()
        if spread <= MIN_VARIANCE * site.double().square().sum(-1).mean():
            raise UserError(
                f"hook={hook}: the first {len(x)} rows are all the same, so that there is nothing to learn; look at "
                "what the store holds (sae-dist store stats)"
            )
    scale = scale_of(x, widths)
    scaled = scale.of(x)
    return scale, float((scaled - scaled.mean(0)).double().square().sum(-1).mean())


def to_checkpoint(state: TrainState) -> Checkpoint:
    """This rank's part of the state as it is; the tensors share memory with it. OwnedRows are latents, in W_enc too."""
    facts = {name: value for name, value in state._asdict().items() if name not in ("step", "learners")}
    tensors: dict[str, Tensor | OwnedRows] = {}
    for member, sae, guard, started_from in state.learners:
        for name, tensor in _transposed(sae.state_dict(), member).items():
            rows = OwnedRows(tensor, sae.latents.start, sae.n_latents) if _is_split(name, member) else tensor
            tensors[member.prefix + name] = rows
        facts[f"{member.prefix}guard"] = guards.to_facts(guard)
        facts[f"{member.prefix}identity"] = identity(member)
        if started_from is not None:
            facts[f"{member.prefix}started_from"] = started_from._asdict()
    return Checkpoint(state.step, tensors, facts)


def from_checkpoint(saved: Checkpoint, members: Sequence[Member], config: TrainConfig, mesh: Mesh) -> TrainState:
    """The saved state, bit for bit; `saved` must have the rows that `owned_rows` selects.

    UserError where it holds other dictionaries, or other formats.
    """
    refuse_others(saved, members)
    facts, learners = dict(saved.facts), []
    source, scales = RowSource(*facts.pop("source")), load(Scales, facts.pop("scales"))
    for member in members:
        tensors = local_tensors(saved, member)
        facts.pop(f"{member.prefix}identity")
        step = _step(tensors, member, config, mesh, scales)
        step.load_state_dict_(tensors)
        guard, began = facts.pop(f"{member.prefix}guard"), facts.pop(f"{member.prefix}started_from", None)
        started_from = None if began is None else load(StartedFrom, began)
        learners.append(Learner(member, step, guards.from_facts(guard), started_from))
    return TrainState(saved.step, tuple(learners), scales, source=source, **facts)


def owned_rows(mesh: Mesh, members: Sequence[Member], only: Member | None = None) -> RowSelector:
    """Selects the rows of every tensor that this rank owns; with `only`, those of one member and none of the others."""
    by_prefix = {member.prefix: member for member in members}

    def rows(name: str, whole: TensorLayout) -> range | None:
        if only is not None and whole.shape and not _is_of(name, only):
            return range(0)
        prefix, own = split_name(name)
        member = by_prefix.get(prefix)  # None: another training's dictionary; its identity will not match
        return mesh.latents(whole.shape[0]) if member and _is_split(own, member) else None

    return rows


def local_tensors(saved: Checkpoint, member: Member) -> dict[str, Tensor]:
    """One dictionary's tensors of a checkpoint, as `MeshStep.load_state_dict_` takes them."""
    own = {name.removeprefix(member.prefix): part for name, part in saved.tensors.items() if _is_of(name, member)}
    tensors = {name: part.local if isinstance(part, OwnedRows) else part for name, part in own.items()}
    return _transposed(tensors, member)


def _is_of(name: str, member: Member) -> bool:
    """Whether a tensor of a checkpoint is this member's."""
    return split_name(name)[0] == member.prefix


def _spec(name: str, member: Member) -> TensorSpec | None:
    """The spec of a tensor of the state, or of the tensor that it is a moment of; None: a counter."""
    own = name.rpartition(".")[2]
    return next((spec for spec in member.tensors if spec.name == own), None)


def _is_split(name: str, member: Member) -> bool:
    """Whether a tensor is split over feature ranks."""
    spec = _spec(name, member)
    if spec is None:
        return name == "tokens_since_fired"
    return spec.per_latent and spec.role == "learned" and not name.startswith("second_column.")


def _transposed(tensors: Mapping[str, Tensor], member: Member) -> dict[str, Tensor]:
    """Between MeshStep's shapes and a checkpoint's, where rows of all matrices are latents."""

    specs = {name: _spec(name, member) for name in tensors}
    return {
        name: tensor.t() if (spec := specs[name]) and spec.stored_transposed and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def _initial(
    x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"] | None, member: Member, config: TrainConfig,
    mesh: Mesh, scales: Scales,
) -> dict[str, Tensor]:  # fmt: skip
    """This rank's part of a dictionary's initial tensors, from scaled rows."""
    sae, k = member.sae, member.sae.k

    def kth(best: Float[Tensor, "sample candidates"]) -> Float[Tensor, " sample"]:
        width = min(k, -(-sae.n_latents // mesh.feature.size))  # what the largest part has
        padded = torch.nn.functional.pad(best, (0, width - best.shape[1]))
        everybody = all_gather(mesh, mesh.feature, padded, name="initialize").permute(1, 0, 2).flatten(1)
        return everybody.topk(k).values[:, -1]

    trained = member.frozen == "nothing"  # the rows of other twins stay random: data's are features already
    weight = config.data_weight(n_latents=sae.n_latents, rows=len(x)) if trained else 0.0
    if weight and len(x) > INIT_ROWS and mesh.is_rank_0:
        logger.info(
            "%s latents begin near data: %s rows are compared with each other", f"{sae.n_latents:,}", f"{len(x):,}"
        )
    parameters, level, b_in = initialize(
        x, target=target, n_latents=sae.n_latents, k=k, seed=member.seed, latents=mesh.latents(sae.n_latents), kth=kth,
        total=lambda part: ordered_sum(mesh, mesh.feature, part, name="initialize"),
        norm=spec_of(sae, "W_dec").initial_norm, blocks=_blocks(member, scales),
        data_weight=weight,
    )  # fmt: skip
    own = sae.start(level) if isinstance(sae, Elementwise) else {}
    tensors = parameters._asdict() | {name: torch.full_like(parameters.b_enc, value) for name, value in own.items()}
    if b_in is None:
        return tensors
    skip = {W_SKIP.name: b_in.new_zeros(len(b_in), len(parameters.b_dec))} if member.skip else {}
    return tensors | {"b_in": b_in} | skip


def _blocks(member: Member, scales: Scales) -> Blocks | None:
    """What the latents of a cross-layer dictionary read and write."""
    return Blocks(scales.x.widths, scales.target.widths, member.sae.n_latents) if member.cross_layer else None


def _step(tensors: Mapping[str, Tensor], member: Member, config: TrainConfig, mesh: Mesh, scales: Scales) -> MeshStep:
    sae, here = member.sae, mesh.latents(member.sae.n_latents)
    own = {spec.name: tensors[spec.name].to(mesh.device) for spec in member.tensors if spec.role != "tracked"}
    k_aux = resolved_k_aux(sae, max(scales.target.widths))
    shard = Shard(
        own["W_enc"], own["W_dec"], b_enc=own["b_enc"], b_dec=own["b_dec"], b_in=own.get("b_in"),
        k=min(sae.k, len(here)), k_aux=k_aux, aux_coefficient=sae.aux_coefficient,
        dead_after_tokens=config.dead_after(sae), first_latent=here.start,
        vectors={spec.name: own[spec.name] for spec in own_vectors(sae)},
        unit=spec_of(sae, "W_dec").unit, product_dtype=getattr(torch, config.product), state=member.state,
    )  # fmt: skip
    return MeshStep(
        shard, mesh, sae=sae, k_aux=k_aux, micro_batch=config.micro_batch, clip_norm=config.clip_norm,
        resamples=bool(config.resample_after), sites=len(scales.target.widths),
        blocks=_blocks(member, scales),
        skip=Skip(own[W_SKIP.name], centre=own["b_in"]) if member.skip else None,
    )  # fmt: skip
