"""The pairs of a step (row, latent, value, gradient), gathered from all data ranks.

A data rank selects pairs for the rows that it encodes; every data rank computes the same update from the pairs of the
whole batch. Where rows have different numbers of latents, pairs are stored in lines and sent without empty places.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from sae_kernels import plain
from sae_kernels.lines import Lines, split_into_lines
from sae_kernels.reference import EMPTY, Selected
from sae_kernels.stages import LinearGradients, LossTerm, Stages
from torch import Tensor

from sae_dist.train.objective import PairGradients
from sae_dist.train.parallel.collectives import all_gather, gather_rows
from sae_dist.train.parallel.mesh import Mesh, owned_range, owned_ranges


class LocalTerm(NamedTuple):
    """The errors of a term of the loss and its selected pairs, for the rows that this data rank encodes."""

    errors: Float[Tensor, "mine d_out"]
    selected: Selected  # z of every row, or of every line
    lines: Lines | None = None  # where rows have different numbers of latents
    cost: Float[Tensor, " sums"] | None = None  # `PairValues.cost`, for kinds whose pairs have values of their own
    # Of nested reconstructions: the weighted sum of the errors of number p and all after it
    nested: Float[Tensor, "mine reconstructions d_out"] | None = None
    frozen: Float[Tensor, "mine d_out"] | None = None  # errors of a second reconstruction, which trains no decoder


class GlobalTerm(NamedTuple):
    """The same for the whole batch, with the gradients of its pairs."""

    loss: LossTerm
    errors: Float[Tensor, "batch d_out"]  # of the finished reconstruction
    every: Float[Tensor, "batch d_out"]  # of nested reconstructions the weighted sum: d loss / d x_hat = scale * every
    lines: Lines | None
    values: Float[Tensor, "lines places"]  # in the reconstruction
    d_own: dict[str, Float[Tensor, "lines places"]]  # d loss / d the latents' own vectors
    through_decoder: Float[Tensor, " d_out"]  # d loss / d b_dec through the reconstruction, negated


# z, d loss / d value, the same of the frozen reconstruction's values -> gradients
Backward = Callable[[Selected, Float[Tensor, "lines places"], Float[Tensor, "lines places"] | None], PairGradients]
Group = Callable[[Selected], Int[Tensor, "lines places"]]  # the first reconstruction that has a pair


def gather_term(
    mesh: Mesh, stages: Stages, mine: LocalTerm, *, batch: int, scale: float, backward: Backward | None = None,
    group: Group | None = None,
) -> GlobalTerm:  # fmt: skip
    """Gathers a term over data ranks: the errors of the whole batch, and its pairs in this part, in the rows' order.

    d loss / d x_hat = scale * errors. `backward` maps d loss / d value to the gradients of z and of the latents' own
    vectors, where a value is not z itself; `group` is given where reconstructions are nested. All data ranks call this
    together.
    """
    data, lines, selected = mesh.data, mine.lines, mine.selected
    sizes = [len(r) for r in owned_ranges(batch, data.size)]
    names, more, d_frozen = (), (), None
    if mine.nested is None or group is None:
        d_values = stages.d_z(_of_lines(lines, mine.errors), selected, scale=scale)
    else:
        source = _source(group(selected), lines, parts=mine.nested.shape[1])
        d_values = stages.d_z(mine.nested.flatten(0, 1), selected, scale=scale, source=source)
    if mine.frozen is not None:
        d_frozen = stages.d_z(_of_lines(lines, mine.frozen), selected, scale=scale)
    if backward is not None:
        values, d_values, d_own = backward(selected, d_values, d_frozen)
        names, more = tuple(d_own), (values, *d_own.values())
    sent = (selected.values, selected.indices.int(), d_values, *more)
    errors = gather_rows(mesh, data, mine.errors, sizes, name="errors")
    nested = None
    if mine.nested is not None:
        nested = gather_rows(mesh, data, mine.nested.flatten(1), sizes, name="errors").view(
            batch, *mine.nested.shape[1:]
        )
    if lines is None:
        sent = tuple(gather_rows(mesh, data, tensor, sizes, name="pairs") for tensor in sent)
    elif data.size > 1:
        sent, lines = _gather_lines(mesh, lines, sent, batch=batch)
    z, indices, d_z, *more = sent
    loss = LossTerm(errors, Selected(z, indices.long()), d_z, scale)
    if nested is not None and group is not None:
        source = _source(group(loss.selected), lines, parts=nested.shape[1])
        loss = loss._replace(errors=nested.flatten(0, 1), source=source)
    values, d_own = z, {}
    if backward is not None:
        values, *of_own = more
        loss, d_own = loss._replace(weights=scale * values), dict(zip(names, of_own, strict=True))
    every = errors if nested is None else nested[:, 0]
    return GlobalTerm(loss, errors, every, lines, values, d_own, scale * every.sum(0))


def _of_lines(lines: Lines | None, errors: Tensor) -> Tensor:
    return errors if lines is None else lines.extended(errors)


def _source(group: Int[Tensor, "lines places"], lines: Lines | None, *, parts: int) -> Int[Tensor, "lines places"]:
    """The row of [rows, parts] errors, flat, that each pair multiplies."""
    rows = torch.arange(len(group) if lines is None else lines.rows, device=group.device)
    return parts * _of_lines(lines, rows)[:, None] + group


def save_for_backward_(
    stages: Stages, rows: Shaped[Tensor, "batch width"], terms: Sequence[GlobalTerm], linear: LinearGradients | None
) -> None:
    """Passes the terms to the kernels. Pairs of the first term may be in lines; AuxK's never are in further lines."""
    losses, lines = [term.loss for term in terms], terms[0].lines
    if lines is not None:
        main, *others = losses
        losses = [main if main.source is not None else main._replace(errors=lines.extended(main.errors))]
        for errors, (values, indices), d_z, scale, *_ in others:
            selected = Selected(lines.padded(values), lines.padded(indices, empty=EMPTY))
            losses.append(LossTerm(lines.padded(errors), selected, lines.padded(d_z), scale))
        rows = lines.extended(rows)
    stages.save_for_backward_(rows, losses, linear)


def own_vector_gradients(term: GlobalTerm, *, n_latents: int) -> dict[str, Float[Tensor, " n_latents"]]:
    """The gradients of the latents' own vectors: for each latent a sum over its pairs in the order of rows."""
    if not term.d_own:
        return {}
    line, place = term.loss.selected.there.nonzero(as_tuple=True)
    if term.lines is not None:  # a row's further lines come after all rows
        owner = term.lines.extended(torch.arange(term.lines.rows, device=line.device))[line]
        order = owner.argsort(stable=True)
        line, place = line[order], place[order]
    latent, order = term.loss.selected.indices[line, place].sort(stable=True)
    offsets = torch.searchsorted(latent, torch.arange(n_latents + 1, device=latent.device))
    ones = torch.ones(len(latent), device=latent.device)
    return {
        name: plain.bag_sums(d[line, place][:, None], order, ones, offsets).squeeze(1)
        for name, d in term.d_own.items()
    }  # fmt: skip


def _gather_lines(mesh: Mesh, lines: Lines, of_lines: Sequence[Tensor], *, batch: int) -> tuple[list[Tensor], Lines]:
    """Gathers the pairs of all data ranks and lays them out in the lines of the whole batch."""
    data, device = mesh.data, lines.row.device
    told = all_gather(mesh, data, torch.tensor([len(lines.row)], device=device), name="pairs")
    counts = [n for (n,) in told.tolist()]
    row = (owned_range(batch, data).start + lines.row).int()
    row, *others = (
        gather_rows(mesh, data, pairs, counts, name="pairs")
        for pairs in (row, *(tensor[lines.line, lines.place] for tensor in of_lines))
    )
    lines, (values, indices, *rest) = split_into_lines(row.long(), rows=batch, width=lines.width), others
    return [*lines.selected(values, indices), *(lines.scatter(pairs) for pairs in rest)], lines
