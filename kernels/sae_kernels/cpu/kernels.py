"""The steps of training in C++: tensors and the buffers that a step reuses."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae_kernels import plain
from sae_kernels.cpu.build import library
from sae_kernels.cpu.calls import Aux, Chosen, Dense, Linear, Tensors, adam, call, is_bf16, matrix
from sae_kernels.ordered import CHUNK, sum_of_chunks
from sae_kernels.reference import Gradients, Selected, StepStatistics, adam_
from sae_kernels.row_state import Hyper, RowState
from sae_kernels.stages import AuxK, LinearGradients, LossTerm, RowGradients

Screen = Literal["auto", "none", "int16"]

_PANEL = 64  # rows of the product's register tile, at most
_LANES = 16
_SCREEN_FROM = 64  # times k latents: the screen's candidates cost more than their share of the product
_DENSE = 8  # AuxK takes dense products up to this many times k_aux dead latents (aux.h)


class Screened(NamedTuple):
    """Counts of the int16 screen (screen.h) so far."""

    rows: int  # rows screened, counted once for every selection
    uncertified: int  # of those, rows that needed the exact product
    candidates: int  # latents of certified rows whose exact pre-activation was computed


def screen_pays() -> bool:
    """Whether int16 products are faster than bf16's on this processor: without AVX-512 BF16."""
    return library() is not None and call("sae_lanes") == 8


class CpuStep:
    """The kernels bound to one dictionary's tensors, with the buffers of a step: made once, grown when a batch grows.

    `enc` and `dec` store the rows of W_enc^T and W_dec, `biases` are b_enc and b_dec, `first` and `second` their Adam
    moments. x - `centre` goes into the encoder, None: x - b_dec. Rows that are not fp32 throughout are updated to the
    bits of `RowState.update_`, subnormal numbers aside (compact.h), and the biases with them by `adam_`.
    """

    def __init__(
        self, enc: RowState, dec: RowState, biases: list[Tensor], first: list[Tensor], second: list[Tensor], *,
        centre: Tensor | None = None, unit: bool = True, screen: Screen = "auto",
    ) -> None:  # fmt: skip
        self.enc, self.dec, self.first, self.second, self.unit = enc, dec, first, second, int(unit)
        self.b_enc, self.b_dec = biases
        self.centre = self.b_dec if centre is None else centre
        (self.n_latents, self.d_out), self.d_in = dec.value.shape, enc.value.shape[1]
        self.all_latents = self.n_latents  # of the whole dictionary, of which this may be a part
        self.total: Callable[[Tensor], Tensor] = lambda part: part  # over the parts
        self.padded = self.d_in + self.d_in % 2
        self._compact = not enc.options.plain
        if is_bf16(enc) and self.padded == self.d_in:
            self.rounded = enc.value
        else:
            self.rounded = torch.zeros(self.n_latents, self.padded, dtype=torch.bfloat16)
        self._buffers: dict[str, Tensor] = {}
        self._none = torch.zeros(self.d_in)
        self._sources: tuple[Tensor, Tensor] | None = None  # of the pairs: errors, rounded rows
        self._dense: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._linear: LinearGradients | None = None
        self._screen_from = 0 if screen == "int16" else _SCREEN_FROM if screen == "auto" and screen_pays() else None
        self._rows_screened, self._counts = 0, torch.zeros(2, dtype=torch.int64)
        self.refresh_()

    @property
    def screened(self) -> Screened:
        return Screened(self._rows_screened, *self._counts.tolist())

    def refresh_(self) -> None:
        """Rounds W_enc again after it was written from outside."""
        if not is_bf16(self.enc):
            self._round(self.enc.value, self._none, self.rounded)
        elif self.rounded is not self.enc.value:
            self.rounded[:, : self.d_in] = self.enc.value

    def encode(self, x: Tensor, *, k: int) -> Selected:
        return self.select(self.rows(x), k=k)

    def rows(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), self.padded, dtype=torch.bfloat16)
        self._round(x.float().contiguous(), self.centre, out)
        return out

    def select(self, rows: Tensor, *, k: int, latents: Tensor | None = None, level: Tensor | None = None) -> Selected:
        rounded, b_enc = self.rounded, self.b_enc if level is None else self.b_enc - level
        if latents is not None:
            rounded, b_enc = rounded[latents], b_enc[latents]
        values, indices = self._select("stage", rounded, b_enc, rows=rows, k=k, sorted_=True)
        chosen = Selected(values.clone(), indices.long())
        return chosen if latents is None else chosen.among(latents)

    def partial(self, selected: Selected) -> Tensor:
        values, indices = selected.values.contiguous(), selected.indices.int().contiguous()
        out = torch.empty(len(values), self.d_out)
        sizes = (*values.shape, self.d_out)
        call("sae_partial", values, indices, *self._W_dec, *sizes, out, torch.get_num_threads())
        return out

    def d_z(self, errors: Tensor, selected: Selected, *, scale: float, source: Tensor | None = None) -> Tensor:
        indices = selected.indices.int().contiguous()
        out, sizes = torch.empty(indices.shape), (*indices.shape, self.d_out)
        call(
            "sae_dots", errors.contiguous(), None if source is None else source.int().contiguous(), indices,
            *self._W_dec, *sizes, float(scale), out, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def mean_z(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        row = self._sum_rows(rows[:, : self.d_in].float().contiguous()) / len(rows)
        return row, plain.mean_z(row, self.enc.value, self.b_enc, product_dtype=torch.bfloat16)

    def save_for_backward_(
        self, rows: Tensor, terms: Sequence[LossTerm], linear: LinearGradients | None = None
    ) -> None:
        batch, self._dense = len(rows), None
        self._linear = linear and LinearGradients(*(None if t is None else t.contiguous() for t in linear))
        errors = torch.cat([term.errors for term in terms]) if len(terms) > 1 else terms[0].errors.contiguous()
        self._sources = (errors, rows.contiguous())
        kept, described, first = [], (Chosen * len(terms))(), 0
        for number, term in enumerate(terms):
            source = None if term.source is None else term.source.int().contiguous()
            own = (term.selected.values.contiguous(), term.selected.indices.int().contiguous(), term.d_z.contiguous(),
                   None if term.weights is None else term.weights.contiguous(), source)  # fmt: skip
            kept.append(own)  # in memory until the pairs are sorted
            described[number] = Chosen(
                *(t if t is None else t.data_ptr() for t in own), term.d_z.shape[1], first, term.scale
            )
            first += len(term.errors)
        self._pairs(described, batch, sum(term.d_z.shape[1] for term in terms))

    def row_gradients(self) -> RowGradients:
        d_enc, d_dec = torch.empty(self.n_latents, self.d_in), torch.empty(self.n_latents, self.d_out)
        d_bias = torch.empty(self.n_latents)
        self._latents(self._described(0), None, d_enc, d_dec, d_bias)
        return RowGradients(d_enc, d_dec, d_bias, self._sum_rows(self._buffers["through_centre"]))

    def update_latents_(self, gradients: RowGradients | None, hyper: Hyper) -> Tensor:
        tensors = self._described(hyper.step)
        if gradients is None:
            d_b_enc = self._buffer("d_b_enc", (self.n_latents,)) if self._compact else None
            self._latents(tensors, hyper, None, None, d_b_enc)
            through = self._sum_rows(self._buffers["through_centre"])
        else:
            d_enc, d_dec, d_b_enc = (g.contiguous() for g in gradients[:3])
            call(
                "sae_update", d_enc, d_dec, d_b_enc, tensors, self.n_latents, self.padded, adam(hyper), self.unit,
                torch.get_num_threads(),
            )  # fmt: skip
            through = gradients.through_centre
        if self._compact and d_b_enc is not None:
            adam_(self.b_enc, d_b_enc, self.first[0], self.second[0], **hyper._asdict())
        for rows in (self.enc, self.dec):
            if rows.options.moments == "factored":
                squares = self.total(sum_of_chunks(self._buffers[f"squares.{rows.stream}"]))
                rows.update_column_(squares, hyper, n_latents=self.all_latents)
        return through

    def update_b_dec_(self, gradient: Tensor, hyper: Hyper) -> None:
        own = (self.b_dec, gradient.contiguous(), self.first[1], self.second[1])
        if self._compact:
            adam_(*own, **hyper._asdict())
        else:
            call("sae_adam", *own, self.d_out, adam(hyper))

    def forward(self, x: Tensor, *, k: int, scale: float, aux: AuxK | None) -> StepStatistics:
        """Selection, reconstruction, errors, AuxK, and the pairs by latent that `gradients` and `update_` take."""
        batch = len(x)
        few, k_dead = aux is None or len(aux.places) <= _DENSE * aux.k, min(aux.k, len(aux.places)) if aux else 0
        rows = self._rows(x)
        chosen = self._select("alive", self.rounded, self.b_enc, rows=self._buffers["rounded_rows"], k=k)
        errors = self._buffer("errors", (batch if few else 2 * batch, self.d_out))
        self._sources = (errors, self._buffers["rounded_rows"])
        squares = self._buffer("squares", (2, batch)).zero_()
        described = (Chosen * (1 if few else 2))(
            self._reconstruct("alive", rows, self.b_dec, chosen, scale, errors, squares, 0)
        )
        self._dense = self._linear = None
        if aux is not None:
            rounded, b_enc = self.rounded[aux.places], self.b_enc[aux.places]
            dead_chosen = self._select("dead", rounded, b_enc, rows=self._buffers["rounded_rows"], k=k_dead)
            if few:
                self._aux(aux.places, dead_chosen, aux.scale, errors, squares[1])
            else:
                dead_chosen.indices.copy_(dead_chosen.among(aux.places).indices)
                described[1] = self._reconstruct("dead", errors, None, dead_chosen, aux.scale, errors, squares, 1)
        self._pairs(described, batch, k if few else k + k_dead)
        fired = torch.empty(self.n_latents, dtype=torch.int64)
        active = call("sae_fired", chosen.indices, batch * k, fired, self.n_latents)
        sums = squares.double().sum(1).float()
        self._through_decoder = (scale, errors[:batch])
        return StepStatistics(sums[0], sums[1], torch.tensor(active), fired)

    def _pairs(self, described: ctypes.Array[Chosen], batch: int, k: int) -> None:
        offsets = self._buffer("offsets", (self.n_latents + 1,), torch.int64)
        pairs = self._buffer("pairs", (batch * k, 4), torch.int32)
        threads = torch.get_num_threads()
        call("sae_pairs", described, len(described), batch, self.n_latents, offsets, pairs, threads)

    def _reconstruct(
        self, name: str, target: Tensor, b_dec: Tensor | None, chosen: Selected, scale: float, errors: Tensor,
        squares: Tensor, kind: int,
    ) -> Chosen:  # fmt: skip
        """Writes target less reconstruction to the term's part of errors and squares; computes d loss / dz."""
        batch, k = chosen.values.shape
        d_z = self._buffer(f"d_z.{name}", (batch, k))
        call(
            "sae_rows", target[:batch], b_dec, *chosen, *self._W_dec, batch, k, self.d_out, float(scale),
            errors[kind * batch :], squares[kind], d_z, torch.get_num_threads(),
        )  # fmt: skip
        return Chosen(*(t.data_ptr() for t in (*chosen, d_z)), None, None, k, kind * batch, scale)

    def _aux(self, places: Tensor, chosen: Selected, scale: float, errors: Tensor, squares: Tensor) -> None:
        """AuxK's gradients of the dead latents, kept until `sae_latents` adds them."""
        batch, k = chosen.values.shape
        slots = self._buffer("slots", (self.n_latents,), torch.int32).fill_(-1)
        slots[places] = torch.arange(len(places), dtype=torch.int32)
        dec, enc = torch.empty(2, len(places), self.d_in)
        bias = torch.empty(len(places))
        inputs = (errors, self._buffers["rounded_rows"], *chosen, self.dec.value, places)
        aux = Aux(
            *(t.data_ptr() for t in inputs), is_bf16(self.dec), batch, k, len(places), self.d_in, self.padded, scale,
            *(t.data_ptr() for t in (squares, dec, enc, bias)),
        )  # fmt: skip
        call("sae_aux_dense", aux, torch.get_num_threads())
        self._dense = (slots, dec, enc, bias)

    def gradients(self) -> Gradients:
        """The dense gradients of the last `forward`."""
        enc, dec, b_enc, through = self.row_gradients()
        return Gradients(enc.t(), dec, b_enc, self._through_decoder_sum() - through)

    def update_(
        self, gradients: Gradients | None, *, step: int, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """The update from dense gradients, or from the last `forward` without ever storing them."""
        hyper = Hyper(step, lr, betas, eps)
        if gradients is None:
            through = self.update_latents_(None, hyper)
            self.update_b_dec_(self._through_decoder_sum() - through, hyper)
            return
        enc, dec, b_enc, d_b_dec = gradients
        self.update_latents_(RowGradients(enc.t(), dec, b_enc, torch.zeros_like(d_b_dec)), hyper)
        self.update_b_dec_(d_b_dec, hyper)

    def _latents(
        self, tensors: Tensors, hyper: Hyper | None, d_enc: Tensor | None, d_dec: Tensor | None, d_bias: Tensor | None
    ) -> None:
        dense = Dense(*(t.data_ptr() for t in self._dense)) if self._dense else None
        linear = self._linear and Linear(
            *(None if t is None else t.data_ptr() for t in self._linear),
            1 if self._linear.dec is None else self._linear.dec.shape[1],
        )
        through_centre = self._buffer("through_centre", (-(-self.n_latents // CHUNK), self.d_in))
        assert self._sources is not None, "no step was begun"
        call(
            "sae_latents", self._buffers["offsets"], self._buffers["pairs"], *self._sources, dense, linear,
            tensors, self.n_latents, self.padded, hyper and adam(hyper), self.unit, d_enc, d_dec, d_bias,
            through_centre, torch.get_num_threads(),
        )  # fmt: skip

    def _through_decoder_sum(self) -> Tensor:
        scale, errors = self._through_decoder
        return scale * self._sum_rows(errors)

    def _sum_rows(self, a: Tensor) -> Tensor:
        out = torch.empty(a.shape[1])
        call("sae_sum_rows", a, len(a), a.shape[1], out, torch.get_num_threads())
        return out

    def _rows(self, x: Tensor) -> Tensor:
        rows = self._buffer("rows", (x.shape[0], self.d_in)).copy_(x)
        rounded = self._buffer("rounded_rows", (x.shape[0], self.padded), torch.bfloat16)
        self._round(rows, self.centre, rounded)
        return rows

    def _round(self, a: Tensor, minus: Tensor, out: Tensor) -> None:
        call("sae_round", a, minus, out, len(a), self.d_in, self.padded, torch.get_num_threads())

    def _select(
        self, name: str, rounded: Tensor, b_enc: Tensor, *, rows: Tensor, k: int, sorted_: bool = False
    ) -> Selected:
        """The k best latents of every rounded row, among those given, into the buffers of that name."""
        batch = len(rows)
        padded_batch = -(-batch // _PANEL) * _PANEL
        capacity = -(-(k + max(k, 64)) // _LANES) * _LANES
        screens = self._screen_from is not None and len(b_enc) >= self._screen_from * k
        self._rows_screened += batch if screens else 0
        values = self._buffer(f"values.{name}", (batch, k))
        indices = self._buffer(f"indices.{name}", (batch, k), torch.int32)
        call(
            "sae_select", rows, rounded, b_enc, batch, len(b_enc), self.padded // 2,
            self._buffer("panels", (padded_batch, self.padded // 2), torch.int32), k, capacity,
            self._buffer("least", (padded_batch,)), self._buffer("count", (padded_batch,), torch.int32),
            self._buffer(f"candidates.{name}", (batch, capacity)),
            self._buffer(f"candidate_indices.{name}", (batch, capacity), torch.int32),
            values, indices, int(sorted_), int(screens), self._counts, torch.get_num_threads(),
        )  # fmt: skip
        return Selected(values, indices)

    @property
    def _W_dec(self) -> tuple[Tensor, int]:
        return self.dec.value, is_bf16(self.dec)

    def _described(self, step: int) -> Tensors:
        """The tensors of an update; of factored moments with their profiles, and room for sums of squared gradients."""
        matrices = []
        for rows in (self.enc, self.dec):
            profile, squares, d_model = None, None, rows.value.shape[1]
            if rows.options.moments == "factored":
                profile = self._buffer(f"profile.{rows.stream}", (d_model,)).copy_(rows.profile())
                chunks = -(-self.n_latents // CHUNK)
                squares = self._buffer(f"squares.{rows.stream}", (chunks, d_model), torch.float64)
            matrices.append(matrix(rows, step, profile=profile, squares=squares))
        vectors = (self.b_enc, self.first[0], self.second[0], self.rounded)
        return Tensors(*matrices, *(tensor.data_ptr() for tensor in vectors), int(self._compact))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[name] = torch.empty(shape, dtype=dtype)
        return buffer
