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
    cost             8 (D F - 1)                  of activity, where the kind has a penalty; 8 more for its worth
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

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from sae_kernels.reference import Gradients, Selected, StepStatistics, aux_weight, error_scale
from sae_kernels.shard import Shard, is_finite
from sae_kernels.stages import LinearGradients, RowGradients
from torch import Tensor

from sae_dist.sae.blocks import Blocks
from sae_dist.sae.variants.interface import (
    NORM,
    CostlySilence,
    Elementwise,
    Nested,
    Penalty,
    Rescaled,
    RowsFirst,
    Scheduled,
    Top,
    Variant,
    own_vectors,
    tracks_threshold,
)
from sae_dist.train.objective import PairGradients, SilenceGradients, pair_gradients, silence_gradients
from sae_dist.train.parallel.batch_select import initial_width
from sae_dist.train.parallel.choose import Choice, Chooser
from sae_dist.train.parallel.collectives import all_gather, ordered_sum
from sae_dist.train.parallel.counts import exchange_counts, fired_rows
from sae_dist.train.parallel.loss_terms import (
    Backward,
    LocalTerm,
    gather_term,
    own_vector_gradients,
    save_for_backward_,
)
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.reconstruct import Decoder
from sae_dist.train.parallel.skip import Skip

LEAST_COST = 1e-30  # of a row, where it divides
THRESHOLD_EMA = 0.1  # weight of a batch in the running mean of thresholds, at first 1 / steps; 0.01 lags behind


class MeshStep:
    """`Shard` over a mesh; `shard` is this rank's part of the dictionary `sae`, `latents` its latents.

    `k_aux` is the whole dictionary's. `micro_batch`: rows encoded at once. `clip_norm`: the largest norm of the whole
    gradient. `resamples`: dead latents are to begin anew some time (resample.py). `sites`: hook points that are rebuilt
    side by side, of equal widths where decoder norms are priced. `skip`, `blocks`: of a dictionary that has
    them.
    All ranks call `forward`, `update_`, `dead_fraction` and `gradients_are_finite` together.
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
        resamples: bool = False,
        sites: int = 1,
        skip: Skip | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        self.shard, self.mesh, self.sae, self.n_latents, self.k_aux = shard, mesh, sae, sae.n_latents, k_aux
        self._sites, self.skip, self._d_skip, self.blocks = sites, skip, None, blocks
        self.latents = mesh.latents(sae.n_latents)
        assert len(self.latents) == shard.n_latents, f"{shard.n_latents} latents, not {len(self.latents)}"
        self.clip_norm = clip_norm
        self._fused = (
            mesh.world.size == 1 and micro_batch is None and isinstance(sae.rule, Top) and not sae.rule.signed
            and not isinstance(sae, Elementwise | Nested) and shard.b_in is None and not resamples and blocks is None
        )  # fmt: skip
        self._chooser = Chooser(
            shard, mesh, latents=self.latents, n_latents=sae.n_latents, at_once=micro_batch, two_rounds=two_rounds,
            width=width or initial_width(sae.rule.k, mesh.feature.size),
        )  # fmt: skip
        # Latents of the finished dictionary are active above it; a running mean, or 0.
        self.threshold = torch.zeros((), dtype=torch.float64) if tracks_threshold(sae) else None
        self._smallest: float | None = None  # smallest chosen value of the last forward
        self.widened = 0  # rows of this rank that were selected again so far
        self.penalty: Penalty | None = None  # of the last forward, for kinds with a penalty
        self._d_own = dict[str, Tensor]()
        self._rates = {spec.name: spec.lr_factor for spec in own_vectors(sae)}
        shard.join_(n_latents=sae.n_latents, total=lambda part: ordered_sum(mesh, mesh.feature, part, name="columns"))
        self._dead: list[int] | None = None  # dead latents of each feature rank; None: not counted yet
        self._flaws = 0  # ranks where d loss / dz is not finite
        self._through_decoder = torch.empty(0)
        self.errors: Float[Tensor, "batch d_out"] | None = None  # of the last forward, kept if it `resamples`
        self._keeps_errors = resamples
        self.gradient_norm: float | None = None  # of the whole mesh before clipping; known if it is clipped

    def gradients_are_finite(self, statistics: StepStatistics) -> bool:
        """Whether the loss and all gradients of the last `forward` are finite on all ranks; equal on every rank."""
        return is_finite(statistics) and not self._flaws

    def skip_(self) -> None:
        """Discards the last `forward`."""
        self._dead = None

    def forward(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None, *, variance: float,
        progress: float = 0.0,
    ) -> StepStatistics:  # fmt: skip
        """The step up to `update_`; `target` is what is to be rebuilt, None: x.

        `progress` is the share of all steps that were taken before. The statistics are of the whole mesh; `fired` is of
        this rank's latents.
        """
        sae = self.sae.at(progress) if isinstance(self.sae, Scheduled) else self.sae
        if self._fused:
            self.shard.k = sae.rule.k
            return self.shard.forward(x, variance=variance)
        stages, scale = self.shard.stages, error_scale(len(x), variance)
        rows, target = stages.rows(x), (x if target is None else target).float()
        decoder = Decoder(self.shard, self.mesh, sae, self._chooser, sites=self._sites)
        if self.skip is not None:
            target = target - self.skip.of(x)
        main = decoder.local_term(self._choose(rows, sae, decoder.own, progress), target)
        row, silence = None, None
        if isinstance(sae, CostlySilence):
            row, mean_z = stages.mean_z(rows)
            silence = silence_gradients(sae, mean_z, decoder.own)
        backward = self._backward(sae, decoder, main.cost, silence, batch=len(x), variance=variance)
        group = decoder.group if isinstance(sae, Nested) else None
        term = gather_term(self.mesh, stages, main, batch=len(x), scale=scale, backward=backward, group=group)
        terms = [term]
        squared_errors = [term.errors.square().sum(), target.new_zeros(())]
        n_dead = sum(self.dead_by_rank())
        if self.k_aux and n_dead:
            k = min(self.k_aux, n_dead)
            chosen = self._chooser.of_dead(rows, self.dead_by_rank(), k=k, width=target.shape[1])
            aux = LocalTerm(decoder.errors(main.errors, chosen, None, of_target=False), chosen)
            weight = aux_weight(self.shard.aux_coefficient, n_dead=n_dead, k_aux=self.k_aux)
            terms.append(gather_term(self.mesh, stages, aux, batch=len(x), scale=scale * weight))
            squared_errors[1] = terms[1].errors.square().sum()
        self._d_own = own_vector_gradients(term, n_latents=len(self.latents))
        save_for_backward_(stages, rows, terms, self._linear_gradients(decoder, row, silence))
        if self.skip is not None:
            self._d_skip = self.skip.gradient(x, term.every, scale=scale)
        self._through_decoder, self.errors = term.through_decoder, term.errors if self._keeps_errors else None
        active = term.values != 0  # a pair may be silent
        if isinstance(sae, Nested) and sae.nesting.finished < len(sae.nesting.weights) - 1:
            active &= decoder.group(term.loss.selected) <= sae.nesting.finished
        gradients = [*(term.loss.d_z for term in terms), *self._d_own.values(), *self._whole_gradients()]
        fired = fired_rows(term.loss.selected.indices, active, n_latents=len(self.latents))
        outcome = exchange_counts(
            self.mesh, self.shard, fired, active.sum(), gradients, torch.stack(squared_errors), tokens=len(x)
        )
        self._dead, self._flaws = outcome.dead, outcome.flaws
        return outcome.statistics

    def track_(self) -> None:
        """Brings the threshold up to the last `forward`; an update does it, too."""
        if self.threshold is not None and self._smallest is not None:
            # A running mean over batches (Bussmann et al. 2024, sec. 3), from the first one that counts a batch on.
            weight = self.threshold.new_tensor(max(1 / (self.shard.steps + 1), THRESHOLD_EMA))
            weight.masked_fill_(self.threshold == 0, 1.0)
            self.threshold += weight * (self._smallest - self.threshold)

    def update_(self, *, lr: float) -> None:
        """The update from the last `forward`."""
        self.track_()
        if self._fused:
            gradients = None
            if self.clip_norm is not None:
                enc, dec, b_enc, b_dec = self.shard.stored_gradients()
                factor = self._clip(enc, dec, b_enc, b_dec)
                gradients = Gradients(enc * factor, dec * factor, b_enc * factor, b_dec * factor)
            self.shard.update_(gradients, lr=lr)
            return
        stages, hyper, factor = self.shard.stages, self.shard.begin_update_(lr), 1.0
        if self.clip_norm is None and self.blocks is None:
            d_b_dec = self._d_b_dec(stages.update_latents_(None, hyper))
        else:
            gradients = self.row_gradients()
            d_b_dec = self._d_b_dec(gradients.through_centre)
            if self.clip_norm is not None:
                factor = self._clip(*gradients[:3], d_b_dec, *self._whole_gradients(), own=self._d_own.values())
                gradients = RowGradients(*(g * factor for g in gradients))
            stages.update_latents_(gradients, hyper)
        stages.update_b_dec_(d_b_dec * factor, hyper)
        if self.skip is not None and self._d_skip is not None:
            self.skip.update_(self._d_skip * factor, hyper)
        self.shard.update_vectors_({name: d * factor for name, d in self._d_own.items()}, hyper, rates=self._rates)

    def row_gradients(self) -> RowGradients:
        """The dense gradients of this rank's rows, from the last `forward`."""
        gradients = self.shard.stages.row_gradients()
        if self.blocks is not None:
            latents = torch.arange(self.latents.start, self.latents.stop, device=gradients.enc.device)
            enc, dec = self.blocks.enc_(gradients.enc, latents), self.blocks.dec_(gradients.dec, latents)
            gradients = gradients._replace(enc=enc, dec=dec)
        return gradients

    def count_(self, fired: Int[Tensor, " n_latents"], *, tokens: int) -> None:
        """Adds the batch's tokens to the silence of every latent of this rank that fired on no row."""
        self.shard.count_(fired, tokens=tokens)

    def dead_by_rank(self) -> list[int]:
        """Dead latents of each feature rank; all ranks call this together."""
        if self._dead is None or self._fused:
            self._dead = all_gather(self.mesh, self.mesh.feature, self.shard.dead.sum(), name="counts").tolist()
        return self._dead

    def begin_anew_(self, latents: Tensor, *, enc: Tensor, dec: Tensor, vectors: Mapping[str, float]) -> None:
        """`Shard.begin_anew_` of some latents of this rank."""
        self.shard.begin_anew_(latents, enc=enc, dec=dec, vectors=vectors)
        self._dead = None

    def dead_fraction(self) -> float:
        """The share of the whole dictionary's latents that are dead."""
        return sum(self.dead_by_rank()) / self.n_latents

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of all state, as tensors that share memory with this object.

        Everything is split by latents, except b_dec and its moments, b_in, W_skip and its moments, the number of steps
        and the threshold, which are equal on all ranks.
        """
        whole = {} if self.skip is None else self.skip.state_dict()
        return self.shard.state_dict() | whole | ({} if self.threshold is None else {"threshold": self.threshold})

    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies in this rank's part of a `state_dict` of this or any other mesh."""
        rest = dict(tensors)
        if self.threshold is not None:
            self.threshold.copy_(rest.pop("threshold"))
        if self.skip is not None:
            self.skip.load_(rest)
        self.shard.load_state_dict_(rest)
        self._dead = None

    def _choose(self, rows: Tensor, sae: Variant, own: Mapping[str, Tensor], progress: float) -> Choice:
        """The active pairs of this rank's rows and latents."""
        rule = sae.rule
        if isinstance(sae, RowsFirst) and progress < sae.rows_fraction:
            rule = Top(rule.k)
        if isinstance(rule, Top):
            return self._chooser.of_rows(rows, k=rule.k, width=self.shard.W_dec.shape[1], signed=rule.signed)
        level = sae.level(own) if isinstance(sae, Elementwise) else None
        choice = self._chooser.of_batch(rows, rule, level)
        self._smallest, self.widened = choice.smallest, self.widened + choice.widened
        return choice

    def _backward(
        self, sae: Variant, decoder: Decoder, cost: Tensor | None, silence: SilenceGradients | None, *, batch: int,
        variance: float,
    ) -> Backward | None:  # fmt: skip
        """The map from gradients of values to those of z and the latents' own vectors; all ranks call this together."""
        if not isinstance(sae, Elementwise) or cost is None:
            return None
        if silence is not None and self.mesh.data.rank == 0:  # every data rank has the same
            cost = cost + batch * silence.cost
        mean = ordered_sum(self.mesh, self.mesh.world, cost, name="cost") / batch
        self.penalty = penalty = sae.penalty(mean[-1], variance=variance, width=self.shard.W_dec.shape[1])
        slope = penalty.slope
        if isinstance(sae, Rescaled):
            slope = slope * mean[1] / mean[0].clamp_min(LEAST_COST)

        def backward(z: Selected, d_values: Tensor, d_frozen: Tensor | None) -> PairGradients:
            return pair_gradients(sae, z, decoder.own_at(z), d_values, d_frozen, price=slope / batch)

        return backward

    def _linear_gradients(
        self, decoder: Decoder, row: Tensor | None, silence: SilenceGradients | None
    ) -> LinearGradients | None:
        """What latents have besides their pairs; adds to the gradients of their own vectors what is theirs."""
        enc = None
        if silence is not None and self.penalty is not None:
            slope = self.penalty.slope.float()
            enc = slope * silence.d_mean_z
            self._d_own = {name: d + slope * silence.d_own[name] for name, d in self._d_own.items()}
        d_norm = self._d_own.pop(NORM, None)
        if enc is None and d_norm is None:
            return None
        return LinearGradients(enc, row, None if d_norm is None else d_norm[:, None] / decoder.site_norms)

    def _d_b_dec(self, through: Float[Tensor, " d_in"]) -> Float[Tensor, " d_out"]:
        if self.shard.b_in is not None:  # the encoder does not read b_dec
            return self._through_decoder
        return self._through_decoder - ordered_sum(self.mesh, self.mesh.feature, through, name="b_dec")

    def _whole_gradients(self) -> list[Tensor]:
        """Those of matrices that every rank has whole."""
        return [] if self._d_skip is None else [self._d_skip]

    def _clip(self, enc: Tensor, dec: Tensor, b_enc: Tensor, *whole: Tensor, own: Iterable[Tensor] = ()) -> float:
        """What the gradient is multiplied by so that its norm over the whole mesh is at most `clip_norm`."""
        assert self.clip_norm is not None
        here = torch.stack([g.double().square().sum() for g in (enc, dec, b_enc, *own)]).sum()
        square = ordered_sum(self.mesh, self.mesh.feature, here, name="norm")
        for gradient in whole:  # b_dec first
            square = square + gradient.double().square().sum()
        self.gradient_norm = norm = float(square) ** 0.5
        return min(self.clip_norm / max(norm, 1e-30), 1.0)
