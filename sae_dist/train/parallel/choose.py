"""Which pairs of a batch are active, for the rows that this rank encodes, by a kind's rule; exact on any mesh."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from sae_kernels import plain
from sae_kernels.lines import Lines, split_into_lines
from sae_kernels.reference import EMPTY, Selected
from sae_kernels.shard import Shard
from torch import Tensor

from sae_dist.sae.variants.interface import Above, Rule, TopOfBatch
from sae_dist.train.parallel.batch_select import batch_best
from sae_dist.train.parallel.mesh import Mesh, owned_range, owned_ranges
from sae_dist.train.parallel.row_select import pays_two_rounds, row_best

LINE_WIDTH = 2  # times k places in a line, where rows have different numbers of latents


class Choice(NamedTuple):
    """The chosen pairs of this rank's rows in its part of the dictionary, with their z."""

    selected: Selected  # of every row, or of every line
    lines: Lines | None = None  # where rows have different numbers of latents
    smallest: float | None = None  # the smallest chosen z of the whole batch, where a batch is counted
    widened: int = 0  # rows of this rank that were selected again


class Chooser:
    """Chooses pairs over a mesh; `shard` is this rank's part, `latents` its latents of `n_latents`.

    `at_once` rows are encoded at a time, None: all. `width`: candidates a row at first, where a batch is counted.
    All ranks call a method together.
    """

    def __init__(
        self, shard: Shard, mesh: Mesh, *, latents: range, n_latents: int, width: int, at_once: int | None,
        two_rounds: bool | None,
    ) -> None:  # fmt: skip
        self.shard, self.mesh, self.latents, self.n_latents = shard, mesh, latents, n_latents
        self.width, self.at_once, self._two_rounds = width, at_once, two_rounds

    def of_rows(self, rows: Tensor, *, k: int, width: int, signed: bool = False) -> Choice:
        """The k largest of every row of the batch `rows` that is this rank's; `signed`: by size, of any sign."""
        available = [len(part) for part in owned_ranges(self.n_latents, self.mesh.feature.size)]
        if not signed:
            return Choice(self._best(rows, None, available, k=k, name="candidates", width=width))
        both = [2 * n for n in available]
        return Choice(plain.signed(self._best(rows, None, both, k=k, name="candidates", width=width, signed=True)))

    def of_dead(self, rows: Tensor, dead_by_rank: list[int], *, k: int, width: int) -> Selected:
        """The k largest of every row among dead latents; `width`: of what is rebuilt."""
        dead = self.shard.dead.nonzero().squeeze(1)
        return self._best(rows, dead, dead_by_rank, k=k, name="aux_candidates", width=width)

    def of_batch(self, rows: Tensor, rule: Rule, level: Tensor | None) -> Choice:
        """The batch's largest, or all above `level` (None: 0) by the rule `Above`; pairs are in lines."""
        batch, k, stages = len(rows), rule.k, self.shard.stages
        mine = owned_range(batch, self.mesh.data)
        chosen = batch_best(
            self.mesh, lambda some, k: stages.select(some, k=k, level=level), rows[mine.start : mine.stop],
            first_row=mine.start, batch=batch, latents=self.latents, n_latents=self.n_latents, k=k,
            counted=isinstance(rule, TopOfBatch), width=self.width, at_once=self.at_once,
        )  # fmt: skip
        assert level is None or isinstance(rule, Above)
        z = chosen.values if level is None else chosen.values + level[chosen.latent]
        lines = split_into_lines(chosen.row, rows=len(mine), width=LINE_WIDTH * k)
        return Choice(lines.selected(z, chosen.latent), lines, chosen.smallest, chosen.widened)

    def chunks(self, rows: range) -> Iterator[range]:
        """The rows `at_once` at a time: every rank of a feature axis makes the same chunks."""
        size = self.at_once or max(len(rows), 1)
        for start in range(rows.start, max(rows.stop, rows.start + 1), size):
            yield range(start, min(start + size, rows.stop))

    def _best(
        self, rows: Tensor, among: Int[Tensor, " some"] | None, available: list[int], *, k: int, name: str, width: int,
        signed: bool = False,
    ) -> Selected:  # fmt: skip
        """The k largest of this rank's rows; signed ones as of `plain.of_both_signs`."""
        feature, latents, chosen = self.mesh.feature, self.latents, []
        two_rounds = self._two_rounds
        if two_rounds is None:
            two_rounds = pays_two_rounds(k, feature.size, width)
        if signed:
            latents = range(2 * latents.start, 2 * latents.stop)
        for chunk in self.chunks(owned_range(len(rows), self.mesh.data)):
            some, k_here = rows[chunk.start : chunk.stop], min(k, available[feature.rank])
            own = self._both_signs(some, k=k_here) if signed else self._here(some, among, k=k_here)
            chosen.append(
                row_best(
                    self.mesh, own, latents=latents, k=k, width=min(k, max(available)), two_rounds=two_rounds, name=name
                )
            )
        return Selected(torch.cat([c.values for c in chosen]), torch.cat([c.indices for c in chosen]))

    def _here(
        self, rows: Tensor, among: Int[Tensor, " some"] | None, *, k: int, level: Tensor | None = None
    ) -> Selected:
        if k == 0 or len(rows) == 0:  # none of the dead is here; fewer rows than data ranks
            nothing = rows.new_empty(len(rows), k, dtype=torch.float32)
            return Selected(nothing, nothing.long())
        return self.shard.stages.select(rows, k=k, latents=among, level=level)

    def _both_signs(self, rows: Tensor, *, k: int) -> Selected:
        """The k largest of +z and -z: of the negated rows at a level of 2 b_enc, z - level is -z."""
        most = min(k, len(self.latents))
        up, down = self._here(rows, None, k=most), self._here(-rows, None, k=most, level=2 * self.shard.b_enc)
        return plain.of_both_signs(up, down, k=k)


def group_first(selected: Selected, inside: Tensor) -> Selected:
    """The pairs that are `inside`, in their order, before all other places, which are empty."""
    order = (~inside).int().argsort(dim=1, stable=True)
    values = torch.where(inside, selected.values, 0.0).gather(1, order)
    return Selected(values, torch.where(inside, selected.indices, EMPTY).gather(1, order))
