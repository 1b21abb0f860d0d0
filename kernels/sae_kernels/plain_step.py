"""A TopK step in plain torch: what `topk_step.TopKStep` calls where no kernel is to be had."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels import plain
from sae_kernels.reference import Gradients, Selected, StepStatistics, adam_, remove_parallel, unit_norm
from sae_kernels.row_state import Hyper
from sae_kernels.stages import Part, RowGradients


class _Pairs(NamedTuple):
    """The active latents of a part, sorted by latent; a latent's pairs lie in the order of their places, then rows."""

    errors: Tensor  # [batch, d_model]
    latent: Tensor  # [pairs]
    row: Tensor
    decoder: Tensor  # weight of errors[row] in dW_dec[latent]
    encoder: Tensor  # weight of rows[row] in dW_enc[:, latent]


class PlainStep:
    """The operations of `plain` bound to one dictionary's tensors, with the pairs of the last forward pass.

    `parameters` are W_enc as [n_latents, d_model], W_dec, b_enc and b_dec; `first` and `second` Adam's moments of them.
    """

    def __init__(
        self, parameters: list[Tensor], first: list[Tensor], second: list[Tensor], *, product_dtype: torch.dtype | None
    ) -> None:
        self.parameters, self.first, self.second, self.product_dtype = parameters, first, second, product_dtype
        self._rows, self._held, self._through_decoder = torch.empty(0), list[_Pairs](), torch.empty(0)

    def refresh_(self) -> None:
        """Nothing is kept of the parameters."""

    def encode(self, x: Tensor, *, k: int) -> Selected:
        """`reference.topk_encode` at the present parameters."""
        return self.select(self.rows(x), k=k)

    def rows(self, x: Tensor) -> Tensor:
        return plain.rounded(x.float() - self.parameters[3], self.product_dtype)

    def select(self, rows: Tensor, *, k: int, latents: Tensor | None = None) -> Selected:
        W_enc, _, b_enc, _ = self.parameters
        if latents is None:
            return plain.select(rows, W_enc.t(), b_enc, k=k, product_dtype=self.product_dtype)
        chosen = plain.select(rows, W_enc[latents].t(), b_enc[latents], k=k, product_dtype=self.product_dtype)
        return Selected(chosen.values, latents[chosen.indices])

    def partial(self, selected: Selected) -> Tensor:
        values, indices = selected
        return torch.nn.functional.embedding_bag(indices, self.parameters[1], per_sample_weights=values, mode="sum")

    def d_z(self, errors: Tensor, selected: Selected, *, scale: float) -> Tensor:
        return scale * plain.gather_dot(errors, self.parameters[1], selected)

    def hold_(self, rows: Tensor, parts: Sequence[Part]) -> None:
        self._rows, self._held = rows, []
        for part in parts:
            values, indices = part.selected
            places, row = (values > 0).t().nonzero(as_tuple=True)
            latent, order = indices[row, places].sort(stable=True)
            row, places = row[order], places[order]
            self._held.append(_Pairs(part.errors, latent, row, part.scale * values[row, places], part.d_z[row, places]))

    def row_gradients(self) -> RowGradients:
        d_enc, d_dec = (torch.zeros_like(self.parameters[0]) for _ in range(2))
        d_bias = torch.zeros_like(self.parameters[2])
        step = max(plain.ELEMENTS // d_enc.shape[1], 1)
        for errors, *pairs in self._held:
            for latent, row, decoder, encoder in zip(*(of_pair.split(step) for of_pair in pairs), strict=True):
                d_dec.index_add_(0, latent, decoder[:, None] * errors[row])
                d_enc.index_add_(0, latent, encoder[:, None] * self._rows[row])
                d_bias.index_add_(0, latent, encoder)
        through = plain.rounded(self.parameters[0], self.product_dtype).t() @ d_bias
        return RowGradients(d_enc, d_dec, d_bias, through)

    def update_latents_(self, gradients: RowGradients | None, hyper: Hyper) -> Tensor:
        gradients = self.row_gradients() if gradients is None else gradients
        W_dec = self.parameters[1]
        by_parameter = (gradients.enc, remove_parallel(gradients.dec, W_dec), gradients.b_enc)
        for parameter, gradient, first, second in zip(self.parameters, by_parameter, self.first, self.second):  # noqa: B905
            adam_(parameter, gradient, first, second, **hyper._asdict())
        W_dec.copy_(unit_norm(W_dec))
        return gradients.through_b_dec

    def update_b_dec_(self, gradient: Tensor, hyper: Hyper) -> None:
        adam_(self.parameters[3], gradient, self.first[3], self.second[3], **hyper._asdict())

    def forward(
        self, x: Tensor, *, k: int, variance: float, dead: Tensor, k_aux: int, aux_coefficient: float
    ) -> StepStatistics:
        """Selection, reconstruction, errors, AuxK, and the pairs by latent that `gradients` and `update_` take."""
        x, scale = x.float(), -2 / (len(x) * variance)
        rows = self.rows(x)
        selected = self.select(rows, k=k)
        errors = x - (self.partial(selected) + self.parameters[3])
        parts = [Part(errors, selected, self.d_z(errors, selected, scale=scale), scale)]
        aux_squared_error = x.new_zeros(())
        places = dead.nonzero().squeeze(1) if k_aux else dead.new_empty(0)
        if len(places):
            aux = self.select(rows, k=min(k_aux, len(places)), latents=places)
            remaining = errors - self.partial(aux)
            aux_scale = scale * aux_coefficient * min(len(places) / k_aux, 1.0)
            parts.append(Part(remaining, aux, self.d_z(remaining, aux, scale=aux_scale), aux_scale))
            aux_squared_error = remaining.square().sum()
        self.hold_(rows, parts)
        self._through_decoder = scale * errors.sum(0)
        active = selected.values > 0
        fired = torch.zeros(len(dead), dtype=torch.bool, device=x.device)
        fired[selected.indices[active]] = True
        return StepStatistics(errors.square().sum(), aux_squared_error, active.sum(), fired)

    def gradients(self) -> Gradients:
        """The dense gradients of the last `forward`."""
        enc, dec, b_enc, through = self.row_gradients()
        return Gradients(enc.t(), dec, b_enc, self._through_decoder - through)

    def update_(
        self, gradients: Gradients | None, *, step: int, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """The update from dense gradients, or from the last `forward`."""
        hyper = Hyper(step, lr, betas, eps)
        if gradients is None:
            self.update_b_dec_(self._through_decoder - self.update_latents_(None, hyper), hyper)
            return
        enc, dec, b_enc, d_b_dec = gradients
        self.update_latents_(RowGradients(enc.t(), dec, b_enc, torch.zeros_like(d_b_dec)), hyper)
        self.update_b_dec_(d_b_dec, hyper)
