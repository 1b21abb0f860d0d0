"""The pairs of a step: which latent a row chose, what it is worth and its gradient, made known to every data rank.

A data rank finds them for the rows that it encodes; all work out one update from those of the whole batch. Where rows
have different numbers of latents, theirs lie in lines, and travel without the empty places.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from sae_kernels import plain
from sae_kernels.lines import Lines, split_into_lines
from sae_kernels.reference import Selected
from sae_kernels.stages import LossTerm, Stages
from torch import Tensor

from sae_dist.train.objective import PairGradients
from sae_dist.train.parallel.collectives import all_gather, gather_rows
from sae_dist.train.parallel.mesh import Mesh, owned_range, owned_ranges


class LocalTerm(NamedTuple):
    """What a term of the loss leaves of its target, for the rows that this data rank encodes, and what it chose."""

    errors: Float[Tensor, "mine d_model"]
    selected: Selected  # z of every row, or of every line
    lines: Lines | None = None  # where rows have different numbers of latents


class GlobalTerm(NamedTuple):
    """The same of the whole batch, with all gradients of its pairs."""

    loss: LossTerm
    lines: Lines | None
    values: Float[Tensor, "lines places"]  # in the reconstruction
    d_own: dict[str, Float[Tensor, "lines places"]]  # d loss / d the latents' own vectors


Backward = Callable[[Selected, Float[Tensor, "lines places"]], PairGradients]


def gather_term(
    mesh: Mesh, stages: Stages, mine: LocalTerm, *, batch: int, scale: float, backward: Backward | None = None
) -> GlobalTerm:
    """The errors of the whole batch and what its rows chose in this part, in the rows' order, perhaps in lines.

    `scale`: d loss / d errors is that times the errors. `backward` goes from d loss / d value to z, where a value is
    not z itself. All data ranks call this at the same time.
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


def save_for_backward_(stages: Stages, rows: Float[Tensor, "batch d_model"], terms: Sequence[GlobalTerm]) -> None:
    """Leave the pairs to the kernels; those of the first use may be in lines, of AuxK none are in further ones."""
    losses, lines = [term.loss for term in terms], terms[0].lines
    if lines is not None:
        main, *others = losses
        losses = [main._replace(errors=lines.extended(main.errors))]
        for errors, (values, indices), d_z, scale, _ in others:
            selected = Selected(lines.padded(values), lines.padded(indices))
            losses.append(LossTerm(lines.padded(errors), selected, lines.padded(d_z), scale))
        rows = lines.extended(rows)
    stages.save_for_backward_(rows, losses)


def own_vector_gradients(term: GlobalTerm, *, n_latents: int) -> dict[str, Float[Tensor, " n_latents"]]:
    """The gradients of the latents' own vectors: sums over pairs, of each latent in the order of rows."""
    if not term.d_own:
        return {}
    line, place = (term.loss.selected.values > 0).nonzero(as_tuple=True)
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
    """What each pair has, in the lines of the whole batch."""
    data, device = mesh.data, lines.row.device
    told = all_gather(mesh, data, torch.tensor([len(lines.row)], device=device), name="pairs")
    counts = [n for (n,) in told.tolist()]
    row = (owned_range(batch, data).start + lines.row).int()
    row, *others = (
        gather_rows(mesh, data, pairs, counts, name="pairs")
        for pairs in (row, *(tensor[lines.line, lines.place] for tensor in of_lines))
    )
    lines = split_into_lines(row.long(), rows=batch, width=lines.width)
    return [lines.scatter(pairs) for pairs in others], lines
