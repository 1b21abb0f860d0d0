"""A training step on a mesh: the latents, loss, gradients and counters that one rank alone would have.

Every rank has the whole batch, and its target: x or, for a transcoder, other rows. A data rank encodes its share of the
rows with the latents of its feature rank. Exchanges, and bytes that a rank receives for B rows with targets of d
dimensions on D x F ranks:

    candidates       8 k (F - 1) B / D            the k largest (row_select.py; two rounds: about 16 k B / D)
    reconstruction   4 d (F - 1) / F B / D        partial sums, to the rank that owns the row
    errors           4 d (1 - 1 / (D F)) B        target - x_hat, to everybody
    pairs            12 k (D - 1) / D B           pairs of a data rank's rows in this part, with d loss / dz; 4 more
                                                  for a value that is not z, and for each of the latents' own vectors
    b_dec            4 d (F - 1)                  its gradient through the encoder
    columns          16 d (F - 1)                 factored moments: sums of squared gradients by dimension
    cost             8 (D F - 1)                  of activity, where the kind has a penalty
    counts           40 (D F - 1)                 active values, dead latents, flaws; the loss, equal on all ranks

The data axis reduces no gradients, which would be 8 d n_latents / F bytes twice; errors and pairs are 4 d B + 12 k B.
Instead all data ranks compute the same update from the same batch, in the same order: they stay equal bit for bit, the
result does not depend on their number, and dead counters need no exchange. (A single process uses the kernels' fused
step: its sums have another order, and its AuxK of few dead latents is a bf16 product.) AuxK adds its own candidates,
sums, errors and pairs while latents are dead. The largest of a batch are found by counts instead of candidates
(threshold, batch_select.py: 16 KiB for any sizes), latents above a level by every part alone; their pairs are sent
without empty places: 16 k / F (D - 1) / D B.

On a GPU the process waits once a step, for the counts, which say whether the step is finite. It waits once more for
AuxK's list of dead latents, once for the norm when clipping, three times for each selection in two rounds, and some
twenty-five times for the cut of a batch. The update runs while the next batch is fetched.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from sae_kernels.lines import split_into_lines
from sae_kernels.reference import Gradients, Selected, StepStatistics, aux_weight, error_scale
from sae_kernels.shard import Shard, is_finite
from sae_kernels.stages import RowGradients, Stages
from torch import Tensor

from sae_dist.sae.variants.interface import (
    Above,
    Elementwise,
    Penalty,
    Top,
    TopOfBatch,
    Variant,
    own_vectors,
    tracks_threshold,
)
from sae_dist.train.objective import OwnVectors, PairGradients, pair_gradients, pair_values
from sae_dist.train.parallel.batch_select import batch_best, initial_width
from sae_dist.train.parallel.collectives import all_gather, gather_rows, ordered_sum, settle_timings, sum_rows
from sae_dist.train.parallel.loss_terms import (
    Backward,
    GlobalTerm,
    LocalTerm,
    gather_term,
    own_vector_gradients,
    save_for_backward_,
)
from sae_dist.train.parallel.mesh import Mesh, owned_range, owned_ranges
from sae_dist.train.parallel.row_select import pays_two_rounds, row_best

LINE_WIDTH = 2  # times k places in a line, where rows have different numbers of latents
THRESHOLD_EMA = 0.1  # weight of a batch in the running mean of thresholds, at first 1 / steps; 0.01 lags behind


class MeshStep:
    """`Shard` over a mesh; `shard` is this rank's part of the dictionary `sae`, `latents` its latents.

    `k_aux` is the whole dictionary's. `micro_batch`: rows encoded at once. `clip_norm`: the largest norm of the whole
    gradient. All ranks call `forward`, `update_`, `dead_fraction` and `gradients_are_finite` together.
    """

    def __init__(
        self,
        shard: Shard,
        mesh: Mesh,
        *,
        sae: Variant,
        k_aux: int,
        micro_batch: int | None = None,
        clip_norm: float | None = None,
        two_rounds: bool | None = None,
        width: int | None = None,
    ) -> None:
        n_latents, k = sae.n_latents, sae.rule.k
        self.shard, self.mesh, self.sae, self.n_latents, self.k, self.k_aux = shard, mesh, sae, n_latents, k, k_aux
        self.latents = mesh.latents(n_latents)
        assert len(self.latents) == shard.n_latents, f"{shard.n_latents} latents, not {len(self.latents)}"
        self.micro_batch, self.clip_norm, self._two_rounds = micro_batch, clip_norm, two_rounds
        self._maths = sae if isinstance(sae, Elementwise) else None
        self._fused = (
            mesh.world.size == 1 and micro_batch is None and isinstance(sae.rule, Top) and not self._maths
            and shard.b_in is None
        )  # fmt: skip
        self._width = width or initial_width(k, mesh.feature.size)
        # Latents of the finished dictionary are active above it; a running mean, for kinds that track one.
        self.threshold = torch.zeros((), dtype=torch.float64) if tracks_threshold(sae) else None
        self._smallest: float | None = None  # smallest chosen value of the last forward
        self.widened = 0  # rows of this rank that were selected again so far
        self.penalty: Penalty | None = None  # of the last forward, for kinds with a penalty
        self._d_own = dict[str, Tensor]()
        self._rates = {spec.name: spec.lr_factor for spec in own_vectors(sae)}
        shard.join_(n_latents=n_latents, total=lambda part: ordered_sum(mesh, mesh.feature, part, name="columns"))
        self._dead: list[int] | None = None  # dead latents of each feature rank; None: not counted yet
        self._flaws = 0  # ranks where d loss / dz is not finite
        self._through_decoder = torch.empty(0)
        self.gradient_norm: float | None = None  # of the whole mesh before clipping; known if it is clipped

    def gradients_are_finite(self, statistics: StepStatistics) -> bool:
        """Whether the loss and all gradients of the last `forward` are finite on all ranks; equal on every rank."""
        return is_finite(statistics) and not self._flaws

    def skip_(self) -> None:
        """Discards the last `forward`."""
        self._dead = None

    def forward(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None, *, variance: float
    ) -> StepStatistics:
        """The step up to `update_`; `target` is what is to be rebuilt, None: x.

        The statistics are of the whole mesh; `fired` is of this rank's latents.
        """
        if self._fused:
            return self.shard.forward(x, variance=variance)
        stages, scale = self.shard.stages, error_scale(len(x), variance)
        rows, target = stages.rows(x), (x if target is None else target).float()
        if isinstance(self.sae.rule, Top):
            main = self._reconstruct(stages, rows, target, None, k=self.k)
        else:
            main = self._reconstruct_lines(stages, rows, target)
        term = gather_term(
            self.mesh, stages, main, batch=len(x), scale=scale, backward=self._backward(main.cost, batch=len(x))
        )
        terms = [term]
        squared_errors = [term.loss.errors.square().sum(), target.new_zeros(())]
        n_dead = sum(self._dead_by_rank())
        if self.k_aux and n_dead:
            aux = self._reconstruct(stages, rows, target, main.errors, k=min(self.k_aux, n_dead))
            weight = aux_weight(self.shard.aux_coefficient, n_dead=n_dead, k_aux=self.k_aux)
            terms.append(gather_term(self.mesh, stages, aux, batch=len(x), scale=scale * weight))
            squared_errors[1] = terms[1].loss.errors.square().sum()
        save_for_backward_(stages, rows, terms)
        self._through_decoder = scale * term.loss.errors.sum(0)
        self._d_own = own_vector_gradients(term, n_latents=len(self.latents))
        return self._statistics(terms, torch.stack(squared_errors), tokens=len(x))

    def update_(self, *, lr: float) -> None:
        """The update from the last `forward`."""
        if self.threshold is not None and self._smallest is not None:
            # A running mean over batches (Bussmann et al. 2024, sec. 3).
            self.threshold += max(1 / (self.shard.steps + 1), THRESHOLD_EMA) * (self._smallest - self.threshold)
        if self._fused:
            gradients = None
            if self.clip_norm is not None:
                enc, dec, b_enc, b_dec = self.shard.stored_gradients()
                factor = self._clip(enc, dec, b_enc, b_dec)
                gradients = Gradients(enc * factor, dec * factor, b_enc * factor, b_dec * factor)
            self.shard.update_(gradients, lr=lr)
            return
        stages, hyper, factor = self.shard.stages, self.shard.begin_update_(lr), 1.0
        if self.clip_norm is None:
            d_b_dec = self._d_b_dec(stages.update_latents_(None, hyper))
        else:
            gradients = stages.row_gradients()
            d_b_dec = self._d_b_dec(gradients.through_centre)
            factor = self._clip(*gradients[:3], d_b_dec, *self._d_own.values())
            stages.update_latents_(RowGradients(*(g * factor for g in gradients)), hyper)
        stages.update_b_dec_(d_b_dec * factor, hyper)
        self.shard.update_vectors_({name: d * factor for name, d in self._d_own.items()}, hyper, rates=self._rates)

    def count_(self, fired: Int[Tensor, " n_latents"], *, tokens: int) -> None:
        """Adds the batch's tokens to the silence of every latent of this rank that fired on no row."""
        self.shard.count_(fired, tokens=tokens)

    def dead_fraction(self) -> float:
        """The share of the whole dictionary's latents that are dead."""
        return sum(self._dead_by_rank()) / self.n_latents

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of all state, as tensors that share memory with this object.

        Everything is split by latents, except b_dec and its moments, b_in, the number of steps and the threshold, which
        are equal on all ranks.
        """
        return self.shard.state_dict() | ({} if self.threshold is None else {"threshold": self.threshold})

    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies in this rank's part of a `state_dict` of this or any other mesh."""
        rest = dict(tensors)
        if self.threshold is not None:
            self.threshold.copy_(rest.pop("threshold"))
        self.shard.load_state_dict_(rest)
        self._dead = None

    def _reconstruct(
        self, stages: Stages, rows: Tensor, target: Tensor, residual: Tensor | None, *, k: int
    ) -> LocalTerm:
        """The errors of the target after k latents, or of the residual after k dead ones, for this rank's rows."""
        mine, feature = owned_range(len(target), self.mesh.data), self.mesh.feature
        latents, available = None, [len(r) for r in owned_ranges(self.n_latents, feature.size)]
        if residual is not None:
            latents, available = self.shard.dead.nonzero().squeeze(1), self._dead_by_rank()
        name = "candidates" if residual is None else "aux_candidates"
        two_rounds = self._two_rounds
        if two_rounds is None:
            two_rounds = pays_two_rounds(k, feature.size, target.shape[1])
        errors, chosen, costs = [], [], []
        for chunk in self._chunks(mine):
            own = self._best_here(stages, rows[chunk.start : chunk.stop], latents, k=min(k, available[feature.rank]))
            selected = row_best(
                self.mesh, own, latents=self.latents, k=k, width=min(k, max(available)), two_rounds=two_rounds,
                name=name,
            )  # fmt: skip
            decoded, cost = (selected, None) if residual is not None else self._decoder_values(selected)
            summed = self._reduced(stages.partial(decoded))
            if residual is None:
                errors.append(self._residual(target[chunk.start : chunk.stop], summed + self.shard.b_dec))
            else:
                at = range(chunk.start - mine.start, chunk.stop - mine.start)
                errors.append(self._residual(residual[at.start : at.stop], summed))
            del summed  # freed before the next chunk's candidates
            chosen.append(selected)
            costs += [] if cost is None else [cost]
        selected = Selected(torch.cat([s.values for s in chosen]), torch.cat([s.indices for s in chosen]))
        return LocalTerm(torch.cat(errors), selected, cost=torch.stack(costs).sum() if costs else None)

    def _reconstruct_lines(self, stages: Stages, rows: Tensor, target: Tensor) -> LocalTerm:
        """The errors of the target after a batch's largest latents, or all above a level, for this rank's rows."""
        mine, level = owned_range(len(target), self.mesh.data), None
        if isinstance(self.sae.rule, Above):
            assert self._maths is not None, f"{self.sae.kind} has a rule Above and no level"
            level = self._maths.level(self.shard.vectors)
        chosen = batch_best(
            self.mesh, lambda some, k: stages.select(some, k=k, level=level), rows[mine.start : mine.stop],
            first_row=mine.start, batch=len(target), latents=self.latents, n_latents=self.n_latents, k=self.k,
            counted=isinstance(self.sae.rule, TopOfBatch), width=self._width, at_once=self.micro_batch,
        )  # fmt: skip
        self._smallest, self.widened = chosen.smallest, self.widened + chosen.widened
        z = chosen.values if level is None else chosen.values + level[chosen.latent]
        lines = split_into_lines(chosen.row, rows=len(mine), width=LINE_WIDTH * self.k)
        selected = lines.selected(z, chosen.latent)
        decoded, cost = self._decoder_values(selected)
        summed = self._reduced(lines.summed(stages.partial(decoded)))
        return LocalTerm(
            self._residual(target[mine.start : mine.stop], summed + self.shard.b_dec), selected, lines, cost
        )

    def _own(self, z: Selected) -> OwnVectors:
        """The latents' own vectors at every place."""
        return {name: vector[z.indices] for name, vector in self.shard.vectors.items()}

    def _decoder_values(self, z: Selected) -> tuple[Selected, Tensor | None]:
        """The values of the chosen pairs, which the decoder multiplies, and the sum of their costs, if any."""
        if self._maths is None:
            return z, None
        values, cost = pair_values(self._maths, z, self._own(z))
        return Selected(values, z.indices), cost

    def _backward(self, cost: Tensor | None, *, batch: int) -> Backward | None:
        """The map from gradients of values to those of z and the latents' own vectors; all ranks call this together."""
        if self._maths is None or cost is None:
            return None
        mean = ordered_sum(self.mesh, self.mesh.world, cost, name="cost") / batch
        self.penalty = self._maths.penalty(mean)
        price = self.penalty.slope / batch

        def backward(z: Selected, d_values: Tensor) -> PairGradients:
            assert self._maths is not None
            return pair_gradients(self._maths, z, self._own(z), d_values, price=price)

        return backward

    def _reduced(self, partial: Float[Tensor, "rows d_out"]) -> Float[Tensor, "share d_out"]:
        """The sum of all parts' partial reconstructions, for this rank's share of the rows."""
        sizes = [len(r) for r in owned_ranges(len(partial), self.mesh.feature.size)]
        return sum_rows(self.mesh, self.mesh.feature, partial, sizes, name="reconstruction")

    def _residual(
        self, target: Float[Tensor, "rows d_out"], rebuilt: Float[Tensor, "share d_out"]
    ) -> Float[Tensor, "rows d_out"]:
        """target - reconstruction for all rows, gathered from the shares of the feature axis."""
        shares, feature = owned_ranges(len(target), self.mesh.feature.size), self.mesh.feature
        share = shares[feature.rank]
        left = target[share.start : share.stop] - rebuilt
        return gather_rows(self.mesh, feature, left, [len(r) for r in shares], name="errors")

    def _best_here(self, stages: Stages, rows: Tensor, latents: Tensor | None, *, k: int) -> Selected:
        if k == 0 or len(rows) == 0:  # none of the dead is here; fewer rows than data ranks
            nothing = rows.new_empty(len(rows), k, dtype=torch.float32)
            return Selected(nothing, nothing.long())
        return stages.select(rows, k=k, latents=latents)

    def _statistics(
        self, terms: list[GlobalTerm], squared_errors: Float[Tensor, " 2"], *, tokens: int
    ) -> StepStatistics:
        """The statistics of the step over the whole mesh, in one exchange.

        It also exchanges how many latents of each part are dead once these tokens are counted, and which ranks have
        gradients that are not finite. The loss is rank 0's, since other numbers of threads may round it otherwise.
        """
        values, indices = terms[0].values, terms[0].loss.selected.indices
        n_here, silence = len(self.latents), self.shard.tokens_since_fired
        places = torch.where(values != 0, indices, n_here).flatten()  # a pair may be silent
        fired = torch.zeros(n_here + 1, dtype=torch.int64, device=values.device)
        fired = fired.scatter_add_(0, places, torch.ones_like(places))[:-1]
        dead = ((fired == 0) & (silence + tokens >= self.shard.dead_after_tokens)).sum()
        gradients = [term.loss.d_z for term in terms] + list(self._d_own.values())
        flaw = torch.stack([~torch.isfinite(gradient).all() for gradient in gradients]).any()
        counted = torch.stack([values.count_nonzero(), dead, flaw.long()])
        mine = torch.cat([counted, squared_errors.double().view(torch.int64)])
        everybody = all_gather(self.mesh, self.mesh.world, mine, name="counts").cpu()  # all at once: see above
        settle_timings(self.mesh)
        counts = everybody.tolist()
        parts = counts[: self.mesh.feature.size]  # of one data rank
        self._dead = [dead for _, dead, *_ in parts]
        self._flaws = sum(flaw for _, _, flaw, *_ in counts)
        squared_error, aux_squared_error = everybody[0, 3:].contiguous().view(torch.float64).float()
        active = torch.tensor(sum(active for active, *_ in parts))
        return StepStatistics(squared_error, aux_squared_error, active, fired)

    def _dead_by_rank(self) -> list[int]:
        if self._dead is None or self._fused:
            self._dead = all_gather(self.mesh, self.mesh.feature, self.shard.dead.sum(), name="counts").tolist()
        return self._dead

    def _d_b_dec(self, through: Float[Tensor, " d_in"]) -> Float[Tensor, " d_out"]:
        if self.shard.b_in is not None:  # the encoder does not read b_dec
            return self._through_decoder
        return self._through_decoder - ordered_sum(self.mesh, self.mesh.feature, through, name="b_dec")

    def _clip(self, enc: Tensor, dec: Tensor, b_enc: Tensor, b_dec: Tensor, *own: Tensor) -> float:
        """What the gradient is multiplied by so that its norm over the whole mesh is at most `clip_norm`."""
        assert self.clip_norm is not None
        here = torch.stack([g.double().square().sum() for g in (enc, dec, b_enc, *own)]).sum()
        square = ordered_sum(self.mesh, self.mesh.feature, here, name="norm") + b_dec.double().square().sum()
        self.gradient_norm = norm = float(square) ** 0.5
        return min(self.clip_norm / max(norm, 1e-30), 1.0)

    def _chunks(self, rows: range) -> Iterator[range]:
        """The rows `micro_batch` at a time: every rank of a feature axis makes the same chunks."""
        size = self.micro_batch or max(len(rows), 1)
        for start in range(rows.start, max(rows.stop, rows.start + 1), size):
            yield range(start, min(start + size, rows.stop))
