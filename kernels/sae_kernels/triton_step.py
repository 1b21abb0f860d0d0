"""A TopK step on a GPU: what `topk_step.TopKStep` calls when its tensors are there."""

import torch
from torch import Tensor

from sae_kernels.reference import Gradients, Selected, StepStatistics
from sae_kernels.triton_aux import DENSE, Compacted, dense_aux
from sae_kernels.triton_latents import Moments, Pairs, schedule_row, update_latents_
from sae_kernels.triton_sparse_decode import decode, gather_dot
from sae_kernels.triton_sparse_gradient import row_gradient, segments
from sae_kernels.triton_topk_encode import encode_select


class TritonStep:
    """The kernels bound to one dictionary's tensors, with the pairs of the last forward pass.

    `parameters` are W_enc as [n_latents, d_model], W_dec, b_enc and b_dec; `first` and `second` Adam's moments of them.
    A bf16 copy of W_enc, 2 bytes a parameter, is what the product reads; the update writes it.
    """

    def __init__(self, parameters: list[Tensor], first: list[Tensor], second: list[Tensor]) -> None:
        moments = [Moments(*tensors) for tensors in zip(parameters, first, second, strict=True)]
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = moments
        self.rounded = torch.empty_like(self.W_enc.value, dtype=torch.bfloat16)
        self.norms = torch.zeros(2, len(self.rounded), device=self.rounded.device)  # of both gradients' rows, squared
        self._d_b_enc = torch.empty_like(self.b_enc.value)
        self._aux: Compacted | None = None
        self.refresh_()

    def refresh_(self) -> None:
        """Round W_enc again, after somebody else wrote it."""
        self.rounded.copy_(self.W_enc.value)

    def encode(self, x: Tensor, *, k: int) -> Selected:
        """`reference.topk_encode` at the present parameters, product in bf16."""
        values, indices, _ = encode_select(self._rows(x), self.rounded, self.b_enc.value, k=k)
        return Selected(values, indices)

    def forward(
        self, x: Tensor, *, k: int, variance: float, dead: Tensor, k_aux: int, aux_coefficient: float
    ) -> StepStatistics:
        """Selection, reconstruction, errors, AuxK, and the pairs by latent that `gradients` and `update_` take."""
        x = x.float()
        n_latents, scale = len(self.rounded), 2 / (x.shape[0] * variance)
        rows = self._rows(x)
        values, indices, _ = encode_select(rows, self.rounded, self.b_enc.value, k=k)
        error = decode(values, indices, self.W_dec.value, self.b_dec.value, residual_of=x)
        d_z = -scale * gather_dot(error, self.W_dec.value, indices) * (values > 0)
        self._through_decoder = -scale * error.sum(0)
        fired = torch.zeros(n_latents + 1, dtype=torch.bool, device=x.device)
        fired = fired.index_fill_(0, torch.where(values > 0, indices, n_latents).flatten(), True)[:-1]
        statistics = StepStatistics(error.square().sum(), x.new_zeros(()), (values > 0).sum(), fired)
        errors, weights, self._aux = error, -scale * values, None
        places = dead.nonzero().squeeze(1) if k_aux else dead.new_empty(0)
        if len(places):
            aux = self._select_dead(rows, places, k=min(k_aux, len(places)))
            aux_scale = scale * aux_coefficient * min(len(places) / k_aux, 1.0)
            if len(places) <= DENSE * k_aux:
                self._aux = dense_aux(rows, error, self.W_dec.value, places, aux, scale=aux_scale)
                statistics = statistics._replace(aux_squared_error=self._aux.squared_error)
                self._through_decoder -= self._aux.bias @ self.rounded[places].float()
            else:
                aux = Selected(aux.values, places[aux.indices])
                aux_error = decode(*aux, self.W_dec.value, None, residual_of=error)
                aux_d_z = -aux_scale * gather_dot(aux_error, self.W_dec.value, aux.indices) * (aux.values > 0)
                statistics = statistics._replace(aux_squared_error=aux_error.square().sum())
                errors = torch.cat([error, aux_error])
                indices, values = torch.cat([indices, aux.indices], 1), torch.cat([values, aux.values], 1)
                weights, d_z = torch.cat([weights, -aux_scale * aux.values], 1), torch.cat([d_z, aux_d_z], 1)
        by_latent = segments(values, indices, n_latents=n_latents)
        self._indices = indices
        self._encoder = Pairs(rows, d_z, by_latent, split=k, shift=0)
        self._decoder = Pairs(errors, weights, by_latent, split=k, shift=len(x))
        return statistics

    def gradients(self) -> Gradients:
        """The dense gradients of the last `forward`."""
        d_enc, d_b_enc = row_gradient(
            self._encoder.rows, self._encoder.weights, self._encoder.by_latent, n_latents=len(self.rounded),
            with_sum=True,
        )  # fmt: skip
        d_dec, _ = row_gradient(
            self._decoder.rows, self._decoder.weights, self._decoder.by_latent, n_latents=len(self.rounded),
            split=self._decoder.split, shift=self._decoder.shift,
        )  # fmt: skip
        assert d_b_enc is not None
        if self._aux:
            dead = self._aux.slots.ge(0).nonzero().squeeze(1)
            for total, part in ((d_enc, self._aux.enc), (d_dec, self._aux.dec), (d_b_enc, self._aux.bias)):
                total.index_add_(0, dead, part)
        return Gradients(d_enc.t(), d_dec, d_b_enc, self._d_b_dec())

    def update_(
        self, gradients: Gradients | None, *, step: int, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """The update from dense gradients, or from the last `forward` without ever storing them."""
        if gradients is None:
            encoder, decoder, d_b_dec, aux = self._encoder, self._decoder, self._d_b_dec(), self._aux
        else:
            encoder, decoder, d_b_dec = gradients.W_enc.t().contiguous(), gradients.W_dec.contiguous(), gradients.b_dec
            self._d_b_enc.copy_(gradients.b_enc)
            aux = None
        schedule = torch.tensor([schedule_row(step=step, lr=lr, betas=betas)], device=self.rounded.device)
        update_latents_(
            self.W_enc, encoder, schedule=schedule, step=0, betas=betas, eps=eps, norms=self.norms[0], unit=False,
            rounded=self.rounded, bias=self.b_enc, bias_gradient=self._d_b_enc,
            extra=aux and (aux.slots, aux.enc, aux.bias),
        )  # fmt: skip
        update_latents_(
            self.W_dec, decoder, schedule=schedule, step=0, betas=betas, eps=eps, norms=self.norms[1], unit=True,
            extra=aux and (aux.slots, aux.dec, aux.bias),
        )  # fmt: skip
        update_latents_(
            Moments(*(tensor[None] for tensor in self.b_dec)), d_b_dec[None], schedule=schedule, step=0, betas=betas,
            eps=eps, norms=torch.empty(1, device=d_b_dec.device), unit=False,
        )  # fmt: skip

    def _d_b_dec(self) -> Tensor:
        """sum g - W_enc d_b_enc: b_dec acts through the decoder and, subtracted from x, through the encoder."""
        return self._through_decoder - decode(self._encoder.weights, self._indices, self.rounded, None).sum(0)

    def _rows(self, x: Tensor) -> Tensor:
        return (x - self.b_dec.value).bfloat16()

    def _select_dead(self, rows: Tensor, places: Tensor, *, k: int) -> Selected:
        """AuxK's selection, by place among the dead latents: one product over the compacted set."""
        values, indices, _ = encode_select(rows, self.rounded[places], self.b_enc.value[places], k=k)
        return Selected(values, indices)
