"""The pairs of a step: which latent a row chose, its value and its gradient, made known to every data rank.

A data rank finds them for the rows that it encodes; all work out one update from those of the whole batch. BatchTopK's
rows have different numbers of latents: theirs lie in lines, and travel without the empty places.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from sae_kernels.lines import Lines, lay
from sae_kernels.reference import Selected
from sae_kernels.stages import Part, Stages
from torch import Tensor

from sae_dist.train.parallel.exchange import all_gather, gather_rows
from sae_dist.train.parallel.mesh import Mesh, part, parts


class Errors(NamedTuple):
    """What a part of the loss leaves of its target, for the rows that this data rank encodes, and what it chose."""

    errors: Float[Tensor, "mine d_model"]
    selected: Selected  # of every row, or of every line
    lines: Lines | None = None  # where rows have different numbers of latents


def everybodys(mesh: Mesh, stages: Stages, mine: Errors, *, batch: int, scale: float) -> tuple[Part, Lines | None]:
    """The errors of the whole batch and what its rows chose in this part, in the rows' order, perhaps in lines.

    `scale`: d loss / d errors is that times the errors. All data ranks call this at the same time.
    """
    data, lines, selected = mesh.data, mine.lines, mine.selected
    sizes = [len(r) for r in parts(batch, data.size)]
    of_lines = mine.errors if lines is None else lines.extended(mine.errors)
    sent = (selected.values, selected.indices.int(), stages.d_z(of_lines, selected, scale=scale))
    errors = gather_rows(mesh, data, mine.errors, sizes, name="errors")
    if lines is None:
        sent = tuple(gather_rows(mesh, data, tensor, sizes, name="pairs") for tensor in sent)
    elif data.size > 1:
        sent, lines = _everybodys_lines(mesh, lines, sent, batch=batch)
    values, indices, d_z = sent
    return Part(errors, Selected(values, indices.long()), d_z, scale), lines


def hold_(stages: Stages, rows: Float[Tensor, "batch d_model"], uses: Sequence[Part], lines: Lines | None) -> None:
    """Leave the pairs to the kernels; those of the first use may be in lines, of AuxK none are in further ones."""
    if lines is not None:
        main, *others = uses
        uses = [main._replace(errors=lines.extended(main.errors))]
        for errors, (values, indices), d_z, scale in others:
            selected = Selected(lines.padded(values), lines.padded(indices))
            uses.append(Part(lines.padded(errors), selected, lines.padded(d_z), scale))
        rows = lines.extended(rows)
    stages.hold_(rows, uses)


def _everybodys_lines(
    mesh: Mesh, lines: Lines, of_lines: Sequence[Tensor], *, batch: int
) -> tuple[list[Tensor], Lines]:
    """What each pair has, in the lines of the whole batch."""
    data, device = mesh.data, lines.row.device
    told = all_gather(mesh, data, torch.tensor([len(lines.row)], device=device), name="pairs")
    counts = [n for (n,) in told.tolist()]
    row = (part(batch, data).start + lines.row).int()
    row, *others = (
        gather_rows(mesh, data, pairs, counts, name="pairs")
        for pairs in (row, *(tensor[lines.line, lines.place] for tensor in of_lines))
    )
    lines = lay(row.long(), rows=batch, width=lines.width)
    return [lines.laid(pairs) for pairs in others], lines
