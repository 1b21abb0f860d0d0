"""A dictionary in training, or one rank's part of it: its tensors and its training step. Trainers use kernels by it.

`Shard` owns everything that a step reads and writes. `stages` are the parts of a step one by one; `forward` and
`update_` are a whole TopK step with AuxK, fused. Its gradients are those of `reference.topk_gradients`, its update is
`remove_parallel`, `adam_`, `unit_norm`, whichever code (`backend`) computes them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kernels.cpu.build import library
from sae_kernels.cpu.kernels import CpuStep, Screen, Screened
from sae_kernels.plain_step import PlainStep
from sae_kernels.reference import Gradients, Selected, StepStatistics, adam_, aux_weight, error_scale
from sae_kernels.row_state import Hyper, RowState, StateOptions
from sae_kernels.stages import AuxK, Stages

if TYPE_CHECKING:
    from sae_kernels.triton_step import TritonStep

Backend = Literal["auto", "torch", "cpu", "triton"]


def is_finite(statistics: StepStatistics) -> bool:
    """Whether both terms of the loss are finite, which implies that all errors and values are."""
    return bool(torch.isfinite(statistics.squared_error + statistics.aux_squared_error))


class Shard:
    """The state of a dictionary in training: parameters, Adam moments, dead counters, reusable buffers.

    W_enc is stored as the transpose of a contiguous [n_latents, d_in] tensor. The given tensors are copied. With
    `unit`, W_dec must have rows of norm 1, and updates keep that norm. `vectors` are further parameters [n_latents], by
    name. `b_in` is for a dictionary that reconstructs other rows than its input x, perhaps of another width: the
    encoder then reads x - b_in, a constant, instead of x - b_dec. Such a dictionary is trained by its `stages`.
    A latent is dead once it has been silent for `dead_after_tokens` tokens. `k`, `k_aux` and `aux_coefficient`
    are for the fused step; `k` may be assigned between steps, `k_aux=0` turns AuxK off. `screen="int16"` halves the
    work of the CPU kernels' product, with the same selection (screen.h); `auto` does so where it is faster.

    Pre-activations are fp32 sums of products of operands rounded to `product_dtype`. The CPU kernels add in the order
    of `reference.ordered_pre_activations`, and their results do not depend on the number of threads.

    `state` says how matrices and moments are stored; states other than fp32 are computed by plain torch on a GPU.
    `first_latent` is the number of this shard's first latent in the whole dictionary; stochastic rounding
    depends on it.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in n_latents"],
        W_dec: Float[Tensor, "n_latents d_out"],
        *,
        b_enc: Float[Tensor, " n_latents"],
        b_dec: Float[Tensor, " d_out"],
        b_in: Float[Tensor, " d_in"] | None = None,
        k: int,
        k_aux: int,
        aux_coefficient: float,
        dead_after_tokens: int,
        vectors: Mapping[str, Float[Tensor, " n_latents"]] = MappingProxyType({}),
        unit: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        product_dtype: torch.dtype = torch.bfloat16,
        state: StateOptions = StateOptions(),  # noqa: B008  immutable
        first_latent: int = 0,
        backend: Backend = "auto",
        screen: Screen = "auto",
    ) -> None:
        n_latents, d_out = W_dec.shape
        d_in = len(W_enc)
        if b_in is None and d_in != d_out:
            raise ValueError(f"W_enc reads {d_in} dimensions and W_dec writes {d_out}; give b_in, of x's own width")
        if not 0 < k <= n_latents:
            raise ValueError(f"k={k} with n_latents={n_latents}; choose 1 <= k <= n_latents")
        self.n_latents, self.k = n_latents, k
        self.k_aux, self.aux_coefficient, self.dead_after_tokens = k_aux, aux_coefficient, dead_after_tokens
        self.betas, self.eps, self.product_dtype, self.backend = betas, eps, product_dtype, backend
        self.state = state
        self._enc = RowState(W_enc.t(), state, stream=0, first_latent=first_latent)
        self._dec = RowState(W_dec, state, stream=1, first_latent=first_latent)
        self.W_dec = self._dec.value
        self.b_enc, self.b_dec = b_enc.detach().float().clone(), b_dec.detach().float().clone()
        self.b_in = None if b_in is None else b_in.detach().float().clone()
        biases = [self.b_enc, self.b_dec]
        self._first, self._second = ([torch.zeros_like(p) for p in biases] for _ in range(2))
        self.vectors = {name: vector.detach().float().clone() for name, vector in vectors.items()}
        self._of_vectors = {
            kind: {name: torch.zeros_like(vector) for name, vector in self.vectors.items()}
            for kind in ("first", "second")
        }
        self.steps = 0
        self.tokens_since_fired: Int[Tensor, " n_latents"] = torch.zeros(
            n_latents, dtype=torch.int64, device=W_dec.device
        )
        on_cpu = W_dec.device.type == "cpu" and product_dtype == torch.bfloat16
        if backend == "cpu" and not (on_cpu and library()):
            raise ValueError(
                "backend=cpu needs CPU tensors, product_dtype=bfloat16, AVX2 with FMA and a compiler; use auto"
            )
        if backend == "triton" and product_dtype != torch.bfloat16:
            raise ValueError(f"backend=triton computes products in bfloat16, not {product_dtype}; use auto or torch")
        if not state.plain and backend == "triton":
            raise ValueError(f"backend=triton stores fp32 only; for {state} use auto or torch")
        self._kernels: PlainStep | CpuStep | TritonStep
        if state.plain and (
            backend == "triton" or (backend == "auto" and W_dec.is_cuda and product_dtype == torch.bfloat16)
        ):
            from sae_kernels import triton_step  # imports Triton, which only a GPU needs

            values = [self._enc.value, self._dec.value, *biases]
            first, second = (
                [self._enc.moments[kind], self._dec.moments[kind], *of_biases]
                for kind, of_biases in (("first", self._first), ("second", self._second))
            )
            self._kernels = triton_step.TritonStep(values, first, second, centre=self.b_in, unit=unit)
        elif backend != "torch" and on_cpu and library():
            self._kernels = CpuStep(
                self._enc, self._dec, biases, self._first, self._second, centre=self.b_in, unit=unit, screen=screen
            )
        else:
            self._kernels = PlainStep(
                self._enc, self._dec, biases, self._first, self._second, centre=self.b_in, unit=unit,
                product_dtype=product_dtype,
            )  # fmt: skip
        if screen == "int16" and not isinstance(self._kernels, CpuStep):
            raise ValueError(f"screen=int16 needs the CPU kernels, but backend={self.backend_used}; use auto")

    @property
    def backend_used(self) -> Backend:
        """The backend in use, which `auto` has chosen."""
        match self._kernels:
            case PlainStep():
                return "torch"
            case CpuStep():
                return "cpu"
            case _:
                return "triton"

    def join_(self, *, n_latents: int, total: Callable[[Tensor], Tensor]) -> None:
        """Makes this a part of a dictionary of `n_latents`; `total` sums a small tensor over all parts.

        Only factored second moments need it: their column is a mean over the whole dictionary.
        """
        if isinstance(self._kernels, PlainStep | CpuStep):
            self._kernels.all_latents, self._kernels.total = n_latents, total

    @property
    def stages(self) -> Stages:
        """The stages of a step on these tensors, for trainers that exchange tensors between stages."""
        return self._kernels

    @property
    def screened(self) -> Screened | None:
        """Counts of the int16 screen; None without CPU kernels."""
        return self._kernels.screened if isinstance(self._kernels, CpuStep) else None

    @property
    def W_enc(self) -> Float[Tensor, "d_in n_latents"]:
        return self._enc.value.t()

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Latents that AuxK trains in the next step."""
        return self.tokens_since_fired >= self.dead_after_tokens

    def step(
        self, x: Float[Tensor, "batch d_model"], *, lr: float, variance: float | Float[Tensor, ""],
        accept: Callable[[StepStatistics], bool] = is_finite,
    ) -> StepStatistics:  # fmt: skip
        """One optimiser step on `topk_loss`; nothing changes where `accept(statistics)` is false."""
        statistics = self.forward(x, variance=variance)
        if accept(statistics):
            self.update_(None, lr=lr)
            self.count_(statistics.fired, tokens=x.shape[0])
        return statistics

    def gradients(
        self, x: Float[Tensor, "batch d_model"], *, variance: float | Float[Tensor, ""]
    ) -> tuple[Gradients, StepStatistics]:
        """Dense gradients of `topk_loss` at the present parameters."""
        statistics = self.forward(x, variance=variance)
        return self.stored_gradients(), statistics

    def stored_gradients(self) -> Gradients:
        """The dense gradients of the last `forward`."""
        return self._kernels.gradients()

    def forward(self, x: Float[Tensor, "batch d_model"], *, variance: float | Float[Tensor, ""]) -> StepStatistics:
        """The first half of `step`; what `update_(None)` needs is kept until then."""
        if self.b_in is not None:
            raise ValueError("the fused step rebuilds its input, and this dictionary has b_in; take its `stages`")
        scale, aux = error_scale(len(x), float(variance)), None
        if self.k_aux and len(places := self.dead.nonzero().squeeze(1)):  # waits for the GPU: before it has work
            weight = aux_weight(self.aux_coefficient, n_dead=len(places), k_aux=self.k_aux)
            aux = AuxK(places, self.k_aux, scale * weight)
        return self._kernels.forward(x, k=self.k, scale=scale, aux=aux)

    def update_(self, gradients: Gradients | None, *, lr: float) -> None:
        """Adam on matrices and biases; unit decoder rows move only across themselves and keep norm 1.

        None: the gradients of the last `forward`, which are never stored dense.
        """
        self._kernels.update_(gradients, **self.begin_update_(lr)._asdict())

    def update_vectors_(
        self, gradients: Mapping[str, Float[Tensor, " n_latents"]], hyper: Hyper, *, rates: Mapping[str, float]
    ) -> None:
        """Adam on the further vectors, from a gradient and a factor of the learning rate (`rates`) for each."""
        for name, vector in self.vectors.items():
            first, second = (self._of_vectors[kind][name] for kind in ("first", "second"))
            own = hyper._replace(lr=hyper.lr * rates[name])
            adam_(vector, gradients[name], first, second, **own._asdict())

    def begin_update_(self, lr: float) -> Hyper:
        """Counts the next update and returns its hyperparameters."""
        self.steps += 1
        return Hyper(self.steps, lr, self.betas, self.eps)

    def count_(self, fired: Int[Tensor, " n_latents"], *, tokens: int) -> None:
        """Adds `tokens` of silence to every latent that fired on no row, and resets those that did.

        Data ranks pass the rows of all of them on which each latent fired, and the tokens of all.
        """
        self.tokens_since_fired.add_(tokens).masked_fill_(fired > 0, 0)

    def begin_anew_(
        self, latents: Int[Tensor, " some"], *, enc: Float[Tensor, "some d_in"], dec: Float[Tensor, "some d_out"],
        vectors: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Gives some latents new rows, a bias of 0, the moments of before the first step, and no silence.

        `vectors` has a value for each of a kind's own vectors.
        """
        self._enc.begin_anew_(latents, enc)
        self._dec.begin_anew_(latents, dec)
        self.b_enc[latents] = 0
        for name, value in vectors.items():
            self.vectors[name][latents] = value
        own = [vector for moments in self._of_vectors.values() for vector in moments.values()]
        for moment in (self._first[0], self._second[0], *own):
            moment[latents] = 0
        self.tokens_since_fired[latents] = 0
        self._kernels.refresh_()

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Selected:
        """`reference.topk_encode` at the present parameters."""
        return self._kernels.encode(x, k=self.k)

    def state_dict(self) -> dict[str, Tensor]:
        """All state of the training, as tensors that share memory with this object.

        Tensors named *W_enc are [d_in, n_latents]. In the others the first dim is n_latents, except *b_dec, b_in and
        second_column.*, which every part of a dictionary has whole.
        """
        tensors = {"W_enc": self._enc.value, "W_dec": self._dec.value, "b_enc": self.b_enc, "b_dec": self.b_dec}
        for name, matrix in (("W_enc", self._enc), ("W_dec", self._dec)):
            tensors |= {f"{kind}.{name}": moment for kind, moment in matrix.moments.items()}
        for kind, moments in (("first", self._first), ("second", self._second)):
            tensors |= {f"{kind}.{name}": moment for name, moment in zip(("b_enc", "b_dec"), moments, strict=True)}
        tensors = {name: tensor.t() if name.endswith("W_enc") else tensor for name, tensor in tensors.items()}
        tensors |= self.vectors if self.b_in is None else self.vectors | {"b_in": self.b_in}
        for kind, moments in self._of_vectors.items():
            tensors |= {f"{kind}.{name}": moment for name, moment in moments.items()}
        return tensors | {
            "tokens_since_fired": self.tokens_since_fired,
            "steps": torch.tensor(self.steps, dtype=torch.int64),
        }

    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies in the tensors of a `state_dict`. ValueError where keys, shapes or dtypes differ."""
        own = self.state_dict()
        if own.keys() != tensors.keys():
            raise ValueError(
                f"the state differs in its keys: {sorted(own.keys() ^ tensors.keys())}; is it stored as {self.state}?"
            )
        for name, tensor in own.items():
            given = tensors[name]
            if (tensor.shape, tensor.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"{name} is {given.dtype} {list(given.shape)} and must be {tensor.dtype} {list(tensor.shape)}"
                )
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])
        self._kernels.refresh_()
