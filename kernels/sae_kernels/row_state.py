"""A matrix with a row a latent and its Adam moments, in a choice of formats, updated a block of latents at a time.

| option | bytes a parameter | what it is |
|---|---|---|
| parameters: float32 | 4 | masters |
| parameters: bfloat16_stochastic | 2 | no masters: values are rounded up or down at random, unbiased (stochastic.py) |
| moments: float32 | 8 | Adam (Kingma & Ba 2015) |
| moments: int8 | 2.03 | both moments in blocks of eight-bit codes (eight_bit.py) |
| moments: factored | 1.02 | the first so; of the second, a number a latent and one a dimension (Shazeer & Stern 2018) |

Within an update, one block of values, gradients and moments is fp32.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kernels import eight_bit
from sae_kernels.eight_bit import Coded
from sae_kernels.reference import adam_, remove_parallel, unit_norm
from sae_kernels.stochastic import random_bits, round_bfloat16

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
        """Whether everything is fp32, the only state that the compiled kernels support."""
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
        rows_at_once = max((IN_CACHE if self.value.device.type == "cpu" else IN_MEMORY) // d_model, 1)
        squares = torch.zeros(d_model, dtype=torch.float64, device=self.value.device)
        for start in range(0, n_latents, rows_at_once):
            rows = slice(start, min(start + rows_at_once, n_latents))
            value, gradient = self.value[rows].float(), gradient_of(rows)
            if unit:
                gradient = remove_parallel(gradient, value)
            match self.options.moments:
                case "float32":
                    adam_(value, gradient, self.moments["first"][rows], self.moments["second"][rows], **hyper._asdict())
                case "int8":
                    first = eight_bit.decode_signed(self._coded("first", rows))
                    second = eight_bit.decode_unsigned(self._coded("second", rows))
                    adam_(value, gradient, first, second, **hyper._asdict())
                    self._store_("first", rows, eight_bit.encode_signed(first, self._bits(rows, hyper.step, 1)))
                    self._store_("second", rows, eight_bit.encode_unsigned(second, self._bits(rows, hyper.step, 2)))
                case "factored":
                    first = eight_bit.decode_signed(self._coded("first", rows))
                    row, column = self.moments["second_row"][rows], self.moments["second_column"]
                    squares += gradient.double().square().sum(0)
                    factored_adam_(value, gradient, first, row, column, **hyper._asdict())
                    self._store_("first", rows, eight_bit.encode_signed(first, self._bits(rows, hyper.step, 1)))
            if unit:
                value = unit_norm(value)
            if self.options.parameters == "float32":
                self.value[rows].copy_(value)
            else:
                self.value[rows].copy_(round_bfloat16(value, self._bits(rows, hyper.step, 0)))
        return squares if self.options.moments == "factored" else None

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

    def _coded(self, name: str, rows: slice) -> Coded:
        return Coded(self.moments[name][rows], self.moments[f"{name}_scale"][rows])

    def _store_(self, name: str, rows: slice, coded: Coded) -> None:
        self.moments[name][rows].copy_(coded.codes)
        self.moments[f"{name}_scale"][rows].copy_(coded.scales)

    def _bits(self, rows: slice, step: int, use: int) -> Tensor:
        latents = torch.arange(rows.start, rows.stop, device=self.value.device) + self.first_latent
        return random_bits(
            latents, self.value.shape[1], seed=self.options.seed, step=step, stream=4 * self.stream + use
        )


def factored_adam_(
    parameter: Float[Tensor, "rows d_model"], gradient: Float[Tensor, "rows d_model"],
    first: Float[Tensor, "rows d_model"], second_row: Float[Tensor, " rows"], second_column: Float[Tensor, " d_model"],
    *, step: int, lr: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One Adam step in place with v[j, i] = row[j] column[i] / mean(column) (Adafactor; Shazeer & Stern 2018, alg. 4).

    row[j] averages a latent's squared gradient over dimensions and steps; column[i] that of a dimension over latents
    and the steps before this one, so that one pass over the rows is enough; at step 1 it is flat. As there, a row's
    update is cut back to a root mean square of 1 (sec. 6): a factored v can be far too small for one element.
    """
    beta1, beta2 = betas
    first.lerp_(gradient, 1 - beta1)
    second_row.lerp_(gradient.square().mean(-1), 1 - beta2)
    mean = second_column.mean()
    profile = torch.where(mean > 0, second_column / mean, 1.0).clamp_min(LEAST_PROFILE)
    root = (second_row / (1 - beta2**step))[:, None].mul(profile).sqrt_().add_(eps)
    update = (first / (1 - beta1**step)).div_(root)
    update /= update.square().mean(-1, keepdim=True).sqrt_().clamp_min_(1)
    parameter.sub_(update, alpha=lr)


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
