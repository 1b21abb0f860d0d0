"""A training step in plain torch, for devices and states that no kernel supports."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels import plain
from sae_kernels.reference import Gradients, Selected, StepStatistics, adam_
from sae_kernels.row_state import Hyper, RowState
from sae_kernels.stages import AuxK, LinearGradients, LossTerm, RowGradients


class _SortedPairs(NamedTuple):
    """A term's pairs, sorted by latent, then place, then row; those of latent j begin at offsets[j]."""

    errors: Tensor  # [errors, d_out]
    row: Tensor  # [pairs]
    error: Tensor  # [pairs]
    decoder: Tensor  # weight of errors[error] in dW_dec[latent]
    encoder: Tensor  # weight of rows[row] in dW_enc[:, latent]
    offsets: Tensor  # [n_latents + 1]


class PlainStep:
    """The operations of `plain` bound to one dictionary's tensors, with the pairs of the last forward pass.

    `enc` and `dec` store the rows of W_enc^T and W_dec. Gradients of matrices are computed for one block of latents at
    a time, right before its update, so no dense gradient is in memory. `biases` are b_enc and b_dec, `first` and
    `second` their Adam moments. x - `centre` goes into the encoder,
    None: x - b_dec.
    """

    def __init__(
        self,
        enc: RowState,
        dec: RowState,
        biases: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        *,
        centre: Tensor | None = None,
        unit: bool,
        product_dtype: torch.dtype | None,
    ) -> None:
        self.enc, self.dec, self.unit, self.product_dtype = enc, dec, unit, product_dtype
        (self.b_enc, self.b_dec), self.first, self.second = biases, first, second
        self.centre = self.b_dec if centre is None else centre
        self.all_latents = len(enc.value)  # of the whole dictionary, of which this may be a part
        self.total: Callable[[Tensor], Tensor] = _alone  # over the parts
        self._rows, self._pairs, self._through_decoder = torch.empty(0), list[_SortedPairs](), torch.empty(0)
        self._linear = LinearGradients()

    def refresh_(self) -> None:
        """Nothing to do: no copy of the parameters is kept."""

    def encode(self, x: Tensor, *, k: int) -> Selected:
        """`reference.topk_encode` at the present parameters."""
        return self.select(self.rows(x), k=k)

    def rows(self, x: Tensor) -> Tensor:
        return plain.rounded(x.float() - self.centre, self.product_dtype)

    def select(self, rows: Tensor, *, k: int, latents: Tensor | None = None, level: Tensor | None = None) -> Selected:
        W_enc, b_enc = self.enc.value, self.b_enc if level is None else self.b_enc - level
        if latents is None:
            return plain.select(rows, W_enc.t(), b_enc, k=k, product_dtype=self.product_dtype)
        chosen = plain.select(rows, W_enc[latents].t(), b_enc[latents], k=k, product_dtype=self.product_dtype)
        return chosen.among(latents)

    def partial(self, selected: Selected) -> Tensor:
        return plain.weighted_rows(selected, self.dec.value)

    def d_z(self, errors: Tensor, selected: Selected, *, scale: float, source: Tensor | None = None) -> Tensor:
        return scale * plain.gather_dot(errors, self.dec.value, selected, source)

    def mean_z(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        row = rows.mean(0)
        return row, plain.mean_z(row, self.enc.value, self.b_enc, product_dtype=self.product_dtype)

    def save_for_backward_(
        self, rows: Tensor, terms: Sequence[LossTerm], linear: LinearGradients | None = None
    ) -> None:
        self._rows, self._pairs, self._linear = rows, [], linear or LinearGradients()
        bounds = torch.arange(len(self.b_enc) + 1, device=rows.device)
        for term in terms:
            values, indices = term.selected
            places, row = term.selected.there.t().nonzero(as_tuple=True)
            latent, order = indices[row, places].sort(stable=True)
            row, places = row[order], places[order]
            weights = term.scale * values if term.weights is None else term.weights
            decoder, encoder = weights[row, places], term.d_z[row, places]
            error = row if term.source is None else term.source[row, places]
            offsets = torch.searchsorted(latent, bounds)
            self._pairs.append(_SortedPairs(term.errors, row, error, decoder, encoder, offsets))

    def row_gradients(self) -> RowGradients:
        every = slice(0, len(self.b_enc))
        d_bias = self._d_bias()
        return RowGradients(self._d_enc(every), self._d_dec(every), d_bias, self._through_centre(d_bias))

    def update_latents_(self, gradients: RowGradients | None, hyper: Hyper) -> Tensor:
        if gradients is None:
            d_bias = self._d_bias()
            enc, dec, through = self._d_enc, self._d_dec, self._through_centre(d_bias)  # before W_enc changes
        else:
            enc, dec, d_bias, through = gradients
            enc, dec = enc.__getitem__, dec.__getitem__
        for matrix, gradient_of, unit in ((self.enc, enc, False), (self.dec, dec, self.unit)):
            squares = matrix.update_(gradient_of, hyper, unit=unit)
            if squares is not None:
                matrix.update_column_(self.total(squares), hyper, n_latents=self.all_latents)
        adam_(self.b_enc, d_bias, self.first[0], self.second[0], **hyper._asdict())
        self._rows, self._pairs = torch.empty(0), []  # freed before the next step's selection
        return through

    def update_b_dec_(self, gradient: Tensor, hyper: Hyper) -> None:
        adam_(self.b_dec, gradient, self.first[1], self.second[1], **hyper._asdict())

    def forward(self, x: Tensor, *, k: int, scale: float, aux: AuxK | None) -> StepStatistics:
        """Selection, reconstruction, errors, AuxK, and the pairs by latent that `gradients` and `update_` take."""
        x = x.float()
        rows = self.rows(x)
        selected = self.select(rows, k=k)
        errors = x - (self.partial(selected) + self.b_dec)
        terms = [LossTerm(errors, selected, self.d_z(errors, selected, scale=scale), scale)]
        aux_squared_error = x.new_zeros(())
        if aux is not None:
            chosen = self.select(rows, k=min(aux.k, len(aux.places)), latents=aux.places)
            remaining = errors - self.partial(chosen)
            terms.append(LossTerm(remaining, chosen, self.d_z(remaining, chosen, scale=aux.scale), aux.scale))
            aux_squared_error = remaining.square().sum()
        self.save_for_backward_(rows, terms)
        self._through_decoder = scale * errors.sum(0)
        active = selected.there
        fired = torch.bincount(selected.indices[active], minlength=len(self.b_enc))
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

    def _d_enc(self, latents: slice) -> Tensor:
        """The gradient of some rows of W_enc^T: of every pair, d_z (x - b_dec)."""
        some = slice(latents.start, latents.stop + 1)
        gradient = _sum(plain.bag_sums(self._rows, h.row, h.encoder, h.offsets[some]) for h in self._pairs)
        if self._linear.enc is not None and self._linear.row is not None:
            gradient.addr_(self._linear.enc[latents], self._linear.row)
        return gradient

    def _d_dec(self, latents: slice) -> Tensor:
        """The gradient of some rows of W_dec: of every pair, scale * value * error."""
        some = slice(latents.start, latents.stop + 1)
        gradient = _sum(plain.bag_sums(h.errors, h.error, h.decoder, h.offsets[some]) for h in self._pairs)
        if self._linear.dec is not None:
            plain.add_linear_(gradient, self._linear.dec[latents], self.dec.value[latents])
        return gradient

    def _d_bias(self) -> Tensor:
        ones = self._rows.new_ones(len(self._rows), 1)
        gradient = _sum(plain.bag_sums(ones, h.row, h.encoder, h.offsets) for h in self._pairs).squeeze(1)
        return gradient if self._linear.enc is None else gradient + self._linear.enc

    def _through_centre(self, d_bias: Tensor) -> Tensor:
        out = torch.zeros_like(self.centre)
        for start in range(0, len(d_bias), plain.TILE):
            part = slice(start, start + plain.TILE)
            out += d_bias[part] @ plain.rounded(self.enc.value[part].float(), self.product_dtype)
        return out


def _alone(addend: Tensor) -> Tensor:
    return addend


def _sum(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    for other in others:
        first += other
    return first
