"""A training step on a GPU by Triton kernels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels import plain
from sae_kernels.cuda_graph import GraphedFunction
from sae_kernels.reference import Gradients, Selected, StepStatistics
from sae_kernels.row_state import Hyper
from sae_kernels.stages import AuxK, LinearGradients, LossTerm, RowGradients
from sae_kernels.triton_aux import DENSE, DeadGradients, dense_aux
from sae_kernels.triton_latents import LinearRows, ParameterState, WeightedPairs, schedule_row, update_latents_
from sae_kernels.triton_sparse_decode import decode, gather_dot
from sae_kernels.triton_sparse_gradient import Segments, row_gradient, segments
from sae_kernels.triton_topk_encode import encode_select


class _Reconstruction(NamedTuple):
    """Results of a forward pass without AuxK; gradients of W_enc and W_dec are sums over its pairs."""

    rows: Tensor
    errors: Tensor
    selected: Selected
    d_z: Tensor
    weights: Tensor
    by_latent: Segments
    squared_error: Tensor
    active: Tensor
    through_decoder: Tensor
    through_encoder: Tensor


class TritonStep:
    """The kernels bound to one dictionary's tensors, with the pairs of the last forward pass.

    `parameters` are W_enc as [n_latents, d_in], W_dec, b_enc and b_dec; `first` and `second` Adam's moments of them.
    x - `centre` goes into the encoder, None: x - b_dec.
    A bf16 copy of W_enc, 2 bytes a parameter, is what the product reads; the update writes it.
    """

    def __init__(
        self, parameters: list[Tensor], first: list[Tensor], second: list[Tensor], *, centre: Tensor | None = None,
        unit: bool = True,
    ) -> None:  # fmt: skip
        self.unit = unit
        moments = [ParameterState(*tensors) for tensors in zip(parameters, first, second, strict=True)]
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = moments
        self.centre = self.b_dec.value if centre is None else centre
        self.rounded = torch.empty_like(self.W_enc.value, dtype=torch.bfloat16)
        self.norms = torch.zeros(2, len(self.rounded), device=self.rounded.device)  # of both gradients' rows, squared
        self._d_b_enc = torch.empty_like(self.b_enc.value)
        self._aux: DeadGradients | None = None
        self._linear = LinearGradients()
        self._of: Hyper | None = None
        self._recorded = GraphedFunction[_Reconstruction]()
        self.refresh_()

    def refresh_(self) -> None:
        """Rounds W_enc again after it was written from outside."""
        self.rounded.copy_(self.W_enc.value)

    def encode(self, x: Tensor, *, k: int) -> Selected:
        """`reference.topk_encode` at the present parameters, product in bf16."""
        values, indices, _ = encode_select(self._rows(x), self.rounded, self.b_enc.value, k=k)
        return Selected(values, indices)

    def forward(self, x: Tensor, *, k: int, scale: float, aux: AuxK | None) -> StepStatistics:
        """Selection, reconstruction, errors, AuxK, and the pairs by latent that `gradients` and `update_` take."""
        main = self._recorded(self._reconstruction, x.float().contiguous(), k=k, scale=scale)
        rows, error, by_latent = main.rows, main.errors, main.by_latent
        self._through_decoder, self._aux, self._linear = main.through_decoder, None, LinearGradients()
        self._through_encoder = main.through_encoder
        statistics = StepStatistics(
            main.squared_error.clone(), x.new_zeros(()), main.active.clone(), by_latent.offsets.diff().long()
        )
        if aux is not None:
            places, chosen = aux.places, self._select_dead(rows, aux.places, k=min(aux.k, len(aux.places)))
            if len(places) <= DENSE * aux.k:
                self._aux = dense_aux(rows, error, self.W_dec.value, places, chosen, scale=aux.scale)
                self._through_encoder = main.through_encoder + self._through_dead(self._aux, places)
                statistics = statistics._replace(aux_squared_error=self._aux.squared_error)
            else:
                chosen = chosen.among(places)
                aux_error = decode(*chosen, self.W_dec.value, None, residual_of=error)
                aux_d_z = gather_dot(aux_error, self.W_dec.value, chosen.indices, scale=aux.scale)
                statistics = statistics._replace(aux_squared_error=aux_error.square().sum())
                self._save(rows, [
                    LossTerm(error, main.selected, main.d_z, scale, main.weights),
                    LossTerm(aux_error, chosen, aux_d_z, aux.scale),
                ])  # fmt: skip
                return statistics
        self._encoder = WeightedPairs(rows, main.d_z, by_latent)
        self._decoder = WeightedPairs(error, main.weights, by_latent)
        return statistics

    def _reconstruction(self, x: Tensor, *, k: int, scale: float) -> "_Reconstruction":
        """The step up to its pairs, without AuxK; its control flow does not depend on values, so it can be recorded."""
        rows = self._rows(x)
        values, indices, _ = encode_select(rows, self.rounded, self.b_enc.value, k=k)
        errors = decode(values, indices, self.W_dec.value, self.b_dec.value, residual_of=x)
        d_z = gather_dot(errors, self.W_dec.value, indices, scale=scale)
        return _Reconstruction(
            rows, errors, Selected(values, indices), d_z, weights=scale * values,
            by_latent=segments(indices, n_latents=len(self.rounded)), squared_error=errors.square().sum(),
            active=values.count_nonzero(), through_decoder=scale * errors.sum(0),
            through_encoder=self._through_centre(d_z, indices),
        )  # fmt: skip

    def gradients(self) -> Gradients:
        """The dense gradients of the last `forward`."""
        enc, dec, b_enc, through = self.row_gradients()
        return Gradients(enc.t(), dec, b_enc, self._through_decoder - through)

    def update_(
        self, gradients: Gradients | None, *, step: int, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """The update from dense gradients, or from the last `forward` without ever storing them."""
        hyper = Hyper(step, lr, betas, eps)
        if gradients is None:
            self.update_b_dec_(self._through_decoder - self.update_latents_(None, hyper), hyper)
            return
        enc, dec, b_enc, d_b_dec = gradients
        self.update_latents_(RowGradients(enc.t(), dec, b_enc, torch.zeros_like(d_b_dec)), hyper)
        self.update_b_dec_(d_b_dec, hyper)

    def rows(self, x: Tensor) -> Tensor:
        return self._rows(x.float())

    def select(self, rows: Tensor, *, k: int, latents: Tensor | None = None, level: Tensor | None = None) -> Selected:
        if latents is not None:
            chosen = self._select_dead(rows, latents, k=k)
            return chosen.among(latents)
        b_enc = self.b_enc.value if level is None else self.b_enc.value - level
        values, indices, _ = encode_select(rows, self.rounded, b_enc, k=k)
        return Selected(values, indices)

    def partial(self, selected: Selected) -> Tensor:
        return decode(*selected, self.W_dec.value, None)

    def d_z(self, errors: Tensor, selected: Selected, *, scale: float, source: Tensor | None = None) -> Tensor:
        return gather_dot(errors, self.W_dec.value, selected.indices, scale=scale, source=source)

    def mean_z(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        row = rows.float().mean(0)
        return row, plain.mean_z(row, self.rounded, self.b_enc.value, product_dtype=None)

    def save_for_backward_(
        self, rows: Tensor, terms: Sequence[LossTerm], linear: LinearGradients | None = None
    ) -> None:
        self._aux, self._linear = None, linear or LinearGradients()
        self._save(rows, terms)
        if self._linear.enc is not None:
            parts = zip(self._linear.enc.split(plain.TILE), self.rounded.split(plain.TILE), strict=True)
            self._through_encoder = self._through_encoder + sum(some @ rows.float() for some, rows in parts)

    def _save(self, rows: Tensor, terms: Sequence[LossTerm]) -> None:
        def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
            return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)

        indices = joined([term.selected.indices for term in terms], 1)
        weights = joined([t.scale * t.selected.values if t.weights is None else t.weights for t in terms], 1)
        d_z, source = joined([term.d_z for term in terms], 1), None
        if len(terms) > 1 or terms[0].source is not None:
            sources, first, own = list[Tensor](), 0, torch.arange(len(rows), device=rows.device)[:, None]
            for term in terms:
                of_term = own.expand(term.d_z.shape) if term.source is None else term.source
                sources.append((of_term + first).int())
                first += len(term.errors)
            source = joined(sources, 1).contiguous()
        by_latent = segments(indices, n_latents=len(self.rounded))
        self._encoder = WeightedPairs(rows, d_z, by_latent)
        self._decoder = WeightedPairs(joined([term.errors for term in terms], 0), weights, by_latent, source)
        self._through_encoder = self._through_centre(d_z, indices)

    def row_gradients(self) -> RowGradients:
        n_latents = len(self.rounded)
        encoder, decoder = self._encoder, self._decoder
        d_enc, d_b_enc = row_gradient(
            encoder.rows, encoder.weights, encoder.by_latent, n_latents=n_latents, with_sum=True
        )
        d_dec, _ = row_gradient(
            decoder.rows, decoder.weights, decoder.by_latent, n_latents=n_latents, source=decoder.source
        )
        assert d_b_enc is not None
        if self._aux:
            dead = self._aux.slots.ge(0).nonzero().squeeze(1)
            for total, part in ((d_enc, self._aux.enc), (d_dec, self._aux.dec), (d_b_enc, self._aux.bias)):
                total.index_add_(0, dead, part)
        if self._linear.enc is not None and self._linear.row is not None:
            d_enc.addr_(self._linear.enc, self._linear.row)
            d_b_enc += self._linear.enc
        if self._linear.dec is not None:
            plain.add_linear_(d_dec, self._linear.dec, self.W_dec.value)
        return RowGradients(d_enc, d_dec, d_b_enc, self._through_encoder)

    def update_latents_(self, gradients: RowGradients | None, hyper: Hyper) -> Tensor:
        if gradients is None:
            encoder, decoder, through, aux = self._encoder, self._decoder, self._through_encoder, self._aux
            linear = self._linear
        else:
            encoder, decoder, through = gradients.enc.contiguous(), gradients.dec.contiguous(), gradients.through_centre
            self._d_b_enc.copy_(gradients.b_enc)
            aux, linear = None, LinearGradients()
        schedule = self._schedule(hyper)
        update_latents_(
            self.W_enc, encoder, schedule=schedule, step=0, betas=hyper.betas, eps=hyper.eps, norms=self.norms[0],
            unit=False, rounded=self.rounded, bias=self.b_enc, bias_gradient=self._d_b_enc,
            extra=aux and (aux.slots, aux.enc, aux.bias),
            linear=None if linear.enc is None else LinearRows(linear.enc[:, None].contiguous(), linear.row),
        )  # fmt: skip
        update_latents_(
            self.W_dec, decoder, schedule=schedule, step=0, betas=hyper.betas, eps=hyper.eps, norms=self.norms[1],
            unit=self.unit, extra=aux and (aux.slots, aux.dec, aux.bias),
            linear=None if linear.dec is None else LinearRows(linear.dec.contiguous(), None),
        )  # fmt: skip
        return through

    def update_b_dec_(self, gradient: Tensor, hyper: Hyper) -> None:
        update_latents_(
            ParameterState(*(tensor[None] for tensor in self.b_dec)), gradient[None], schedule=self._schedule(hyper),
            step=0, betas=hyper.betas, eps=hyper.eps, norms=torch.empty(1, device=gradient.device), unit=False,
        )  # fmt: skip

    def _schedule(self, hyper: Hyper) -> Tensor:
        """`hyper` as a tensor, copied once a step, from page-locked memory so that the copy does not wait."""
        if hyper != self._of:
            row, on_gpu = schedule_row(step=hyper.step, lr=hyper.lr, betas=hyper.betas), self.rounded.is_cuda
            self._of = hyper
            self._row = torch.tensor([row], pin_memory=on_gpu).to(self.rounded.device, non_blocking=True)
        return self._row

    def _through_centre(self, d_z: Tensor, indices: Tensor) -> Tensor:
        """W_enc d_b_enc of some pairs: what is subtracted from x acts through the encoder."""
        return decode(d_z, indices, self.rounded, None).sum(0)

    def _through_dead(self, aux: DeadGradients, places: Tensor) -> Tensor:
        return aux.bias @ self.rounded[places].float()

    def _rows(self, x: Tensor) -> Tensor:
        return torch.sub(x, self.centre, out=torch.empty(x.shape, dtype=torch.bfloat16, device=x.device))

    def _select_dead(self, rows: Tensor, places: Tensor, *, k: int) -> Selected:
        """AuxK's selection, by place among the dead latents: one product over the compacted set."""
        values, indices, _ = encode_select(rows, self.rounded[places], self.b_enc.value[places], k=k)
        return Selected(values, indices)
