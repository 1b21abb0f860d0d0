"""The pairs of a step (row, latent, value, gradient), gathered from all data ranks.

A data rank selects pairs for the rows that it encodes; every data rank computes the same update from the pairs of the
whole batch. Where rows have different numbers of latents, pairs are stored in lines and sent without empty places.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from sae_kernels import plain
from sae_kernels.lines import Lines, split_into_lines
from sae_kernels.reference import EMPTY, Selected
from sae_kernels.stages import LossTerm, Stages
from torch import Tensor

from sae_dist.train.objective import PairGradients
from sae_dist.train.parallel.collectives import all_gather, gather_rows
from sae_dist.train.parallel.mesh import Mesh, owned_range, owned_ranges


class LocalTerm(NamedTuple):
    """The errors of a term of the loss and its selected pairs, for the rows that this data rank encodes."""

    errors: Float[Tensor, "mine d_out"]
    selected: Selected  # z of every row, or of every line
    lines: Lines | None = None  # where rows have different numbers of latents
    cost: Float[Tensor, ""] | None = None  # of these pairs, for kinds whose pairs are worth something else than z


class GlobalTerm(NamedTuple):
    """The same for the whole batch, with the gradients of its pairs."""

    loss: LossTerm
    lines: Lines | None
    values: Float[Tensor, "lines places"]  # in the reconstruction
    d_own: dict[str, Float[Tensor, "lines places"]]  # d loss / d the latents' own vectors


Backward = Callable[[Selected, Float[Tensor, "lines places"]], PairGradients]


def gather_term(
    mesh: Mesh, stages: Stages, mine: LocalTerm, *, batch: int, scale: float, backward: Backward | None = None
) -> GlobalTerm:
    """Gathers a term over data ranks: the errors of the whole batch, and its pairs in this part, in the rows' order.

    d loss / d x_hat = scale * errors. `backward` maps d loss / d value to the gradients of z and of the latents' own
    vectors, where a value is not z itself. All data ranks call this together.
    """
    data, lines, selected = mesh.data, mine.lines, mine.selected
    sizes = [len(r) for r in owned_ranges(batch, data.size)]
    of_lines = mine.errors if lines is None else lines.extended(mine.errors)
    d_values, names, more = stages.d_z(of_lines, selected, scale=scale), (), ()
    if backward is not None:
        values, d_values, d_own = backward(selected, d_values)
        names, more = tuple(d_own), (values, *d_own.values())
    sent = (selected.values, selected.indices.int(), d_values, *more)
    errors = gather_rows(mesh, data, mine.errors, sizes, name="errors")
    if lines is None:
        sent = tuple(gather_rows(mesh, data, tensor, sizes, name="pairs") for tensor in sent)
    elif data.size > 1:
        sent, lines = _gather_lines(mesh, lines, sent, batch=batch)
    z, indices, d_z, *more = sent
    loss = LossTerm(errors, Selected(z, indices.long()), d_z, scale)
    if backward is None:
        return GlobalTerm(loss, lines, z, {})
    values, *of_own = more
    loss = loss._replace(weights=scale * values)
    return GlobalTerm(loss, lines, values, dict(zip(names, of_own, strict=True)))


def save_for_backward_(stages: Stages, rows: Shaped[Tensor, "batch width"], terms: Sequence[GlobalTerm]) -> None:
    """Passes the terms to the kernels. Pairs of the first term may be in lines; AuxK's never are in further lines."""
    losses, lines = [term.loss for term in terms], terms[0].lines
    if lines is not None:
        main, *others = losses
        losses = [main._replace(errors=lines.extended(main.errors))]
        for errors, (values, indices), d_z, scale, *_ in others:
            selected = Selected(lines.padded(values), lines.padded(indices, empty=EMPTY))
            losses.append(LossTerm(lines.padded(errors), selected, lines.padded(d_z), scale))
        rows = lines.extended(rows)
    stages.save_for_backward_(rows, losses)


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
