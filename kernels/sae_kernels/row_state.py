"""A matrix with a row a latent and its Adam moments, in a choice of formats, updated a block of latents at a time.

| option | bytes a parameter | what it is |
|---|---|---|
| parameters: float32 | 4 | masters |
| parameters: bfloat16_stochastic | 2 | no masters: values are rounded up or down at random, unbiased (stochastic.py) |
| moments: float32 | 8 | Adam (Kingma & Ba 2015) |
| moments: int8 | 2.03 | both moments in blocks of eight-bit codes (eight_bit.py) |
| moments: factored | 1.02 | the first so; of the second, a number a latent and one a dimension (Shazeer & Stern 2018) |

Within an update, one block of values, gradients and moments is fp32. Compact state is updated by the arithmetic of
ordered.py, to the same bits by plain torch here and by the CPU kernels (compact.h).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels import eight_bit, ordered, reference
from sae_kernels.eight_bit import Coded
from sae_kernels.ordered import CHUNK, chunk_sums, factored_adam_, row_means, sum_of_chunks
from sae_kernels.stochastic import key_of, random_bits, round_bfloat16

IN_CACHE = 1 << 18  # elements updated at once by a CPU: 1 MiB of each stays in its cache
IN_MEMORY = 1 << 24  # by an accelerator: 64 MiB of each, for which a launch is short
LEAST_PROFILE = 1e-6  # of a dimension's mean square over the mean of all: no division by zero where one is silent

ParameterFormat = Literal["float32", "bfloat16_stochastic"]
MomentFormat = Literal["float32", "int8", "factored"]


class StateOptions(NamedTuple):
    """How a dictionary's two matrices and their moments are stored; biases are fp32 always."""

    parameters: ParameterFormat = "float32"
    moments: MomentFormat = "float32"
    seed: int = 0  # of the roundings

    @property
    def plain(self) -> bool:
        """Whether everything is fp32, the only state that the Triton kernels support."""
        return self.parameters == "float32" and self.moments == "float32"


class Hyper(NamedTuple):
    """Adam's hyperparameters for one step; `step` counts from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float


GradientOf = Callable[[slice], Tensor]  # rows of this shard -> their gradient, fp32 [rows, d_model]


class RowState:
    """The rows [n_latents, d_model] of a shard whose first latent is `first_latent` of the whole dictionary.

    `stream` tells the matrices of one dictionary apart, so that they are not rounded by the same random bits. The
    tensors of `moments` have a row a latent, except `second_column` [d_model], which is the same on all shards.
    """

    def __init__(
        self, value: Float[Tensor, "n_latents d_model"], options: StateOptions, *, stream: int, first_latent: int = 0
    ) -> None:
        self.options, self.stream, self.first_latent = options, stream, first_latent
        (n_latents, d_model), device = value.shape, value.device
        if options.parameters == "float32":
            self.value = value.detach().float().clone(memory_format=torch.contiguous_format)
        else:
            self.value = torch.empty(n_latents, d_model, dtype=torch.bfloat16, device=device)
            self.value.copy_(value)  # to nearest, once
        self.moments = _moments(options.moments, n_latents, d_model, device)

    def update_(self, gradient_of: GradientOf, hyper: Hyper, *, unit: bool) -> Float[Tensor, " d_model"] | None:
        """One Adam step on every row; `unit` removes the gradient along each row and keeps rows at norm 1.

        Factored moments: returns this shard's sum of squared gradients by dimension; `update_column_` takes the sum of
        all shards' sums. Otherwise returns None.
        """
        n_latents, d_model = self.value.shape
        at_once = (IN_CACHE if self.value.device.type == "cpu" else IN_MEMORY) // d_model
        rows_at_once = max(at_once // CHUNK, 1) * CHUNK
        squares = []
        arithmetic = reference if self.options.plain else ordered
        for start in range(0, n_latents, rows_at_once):
            rows = slice(start, min(start + rows_at_once, n_latents))
            value, gradient = self.value[rows].float(), gradient_of(rows)
            if unit:
                gradient = arithmetic.remove_parallel(gradient, value)
            match self.options.moments:
                case "float32":
                    arithmetic.adam_(
                        value, gradient, self.moments["first"][rows], self.moments["second"][rows], **hyper._asdict()
                    )
                case "int8":
                    first = eight_bit.decode_signed(self._coded("first", rows))
                    second = eight_bit.decode_unsigned(self._coded("second", rows))
                    arithmetic.adam_(value, gradient, first, second, **hyper._asdict())
                    self._store_("first", rows, eight_bit.encode_signed(first, self._bits(rows, hyper.step, 1)))
                    self._store_("second", rows, eight_bit.encode_unsigned(second, self._bits(rows, hyper.step, 2)))
                case "factored":
                    first = eight_bit.decode_signed(self._coded("first", rows))
                    squares.append(chunk_sums(gradient.double().square()))
                    row, profile = self.moments["second_row"][rows], self.profile()
                    factored_adam_(value, gradient, first, row, profile, **hyper._asdict())
                    self._store_("first", rows, eight_bit.encode_signed(first, self._bits(rows, hyper.step, 1)))
            if unit:
                value = arithmetic.unit_norm(value)
            if self.options.parameters == "float32":
                self.value[rows].copy_(value)
            else:
                self.value[rows].copy_(round_bfloat16(value, self._bits(rows, hyper.step, 0)))
        return sum_of_chunks(torch.cat(squares)) if squares else None

    def begin_anew_(self, latents: Int[Tensor, " some"], value: Float[Tensor, "some d_model"]) -> None:
        """Gives some rows a new value and the moments of before the first step."""
        self.value[latents] = value.to(self.value.dtype)
        fresh = _moments(self.options.moments, len(latents), self.value.shape[1], self.value.device)
        for name, moment in fresh.items():
            if name != "second_column":
                self.moments[name][latents] = moment

    def update_column_(self, squares: Float[Tensor, " d_model"], hyper: Hyper, *, n_latents: int) -> None:
        """Factored moments: updates the column by each dimension's mean squared gradient over all `n_latents`."""
        column = self.moments["second_column"]
        column.lerp_((squares / n_latents).to(column.dtype), 1 - hyper.betas[1])

    def profile(self) -> Float[Tensor, " d_model"]:
        """Factored moments: each dimension's share of the mean square, 1 where all are equal, as before any step."""
        column = self.moments["second_column"]
        mean = row_means(column[None])[0]
        return torch.where(mean > 0, column / mean, 1.0).clamp_min(LEAST_PROFILE)

    def keys(self, step: int) -> tuple[int, int, int]:
        """`stochastic.key_of` the roundings of one step: of the values, the first and the second moments."""
        value, first, second = (key_of(**self._use(step, use)) for use in range(3))
        return value, first, second

    def _coded(self, name: str, rows: slice) -> Coded:
        return Coded(self.moments[name][rows], self.moments[f"{name}_scale"][rows])

    def _store_(self, name: str, rows: slice, coded: Coded) -> None:
        self.moments[name][rows].copy_(coded.codes)
        self.moments[f"{name}_scale"][rows].copy_(coded.scales)

    def _bits(self, rows: slice, step: int, use: int) -> Tensor:
        latents = torch.arange(rows.start, rows.stop, device=self.value.device) + self.first_latent
        return random_bits(latents, self.value.shape[1], **self._use(step, use))

    def _use(self, step: int, use: int) -> dict[str, int]:
        return {"seed": self.options.seed, "step": step, "stream": 4 * self.stream + use}


def _moments(kind: MomentFormat, n_latents: int, d_model: int, device: torch.device) -> dict[str, Tensor]:
    def coded(name: str) -> dict[str, Tensor]:
        codes, scales = eight_bit.zeros(n_latents, d_model, device)
        return {name: codes, f"{name}_scale": scales}

    match kind:
        case "float32":
            return {name: torch.zeros(n_latents, d_model, device=device) for name in ("first", "second")}
        case "int8":
            return coded("first") | coded("second")
        case "factored":
            by_row = {"second_row": torch.zeros(n_latents, device=device)}
            return coded("first") | by_row | {"second_column": torch.zeros(d_model, device=device)}
    assert_never(kind)
