"""One optimiser step of a TopK dictionary as one call: the seam between a trainer and the kernels.

`TopKStep` owns everything that a step reads and writes. Its gradients are those of `reference.topk_gradients` and its
update is `remove_parallel`, `adam_`, `unit_norm`; which code computes them (`backend`) is all that differs.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kernels.cpu.build import library
from sae_kernels.cpu.kernels import CpuStep, Screen, Screened
from sae_kernels.plain_step import PlainStep
from sae_kernels.reference import Gradients, Selected, StepStatistics
from sae_kernels.row_state import Hyper
from sae_kernels.stages import Stages

if TYPE_CHECKING:
    from sae_kernels.triton_step import TritonStep

Backend = Literal["auto", "torch", "cpu", "triton"]


class TopKStep:
    """The state of a TopK dictionary in training: parameters, Adam moments, dead counters, reusable buffers.

    W_enc is kept as the transpose of a contiguous [n_latents, d_model] tensor. The tensors given are copied. W_dec must
    have unit rows. A latent is dead once it has been silent for `dead_after_tokens` tokens; `k_aux=0` turns AuxK off.
    `k` may be assigned between steps. `screen="int16"` halves the CPU kernels' product, for the same selection
    (screen.h); `auto` does so where it is faster.

    Pre-activations are sums in fp32 over operands rounded to `product_dtype`. On a CPU with the kernels their order is
    that of `reference.ordered_pre_activations`, and everything is the same bitwise for any number of threads.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "d_model n_latents"],
        W_dec: Float[Tensor, "n_latents d_model"],
        *,
        b_enc: Float[Tensor, " n_latents"],
        b_dec: Float[Tensor, " d_model"],
        k: int,
        k_aux: int,
        aux_coefficient: float,
        dead_after_tokens: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        product_dtype: torch.dtype = torch.bfloat16,
        backend: Backend = "auto",
        screen: Screen = "auto",
    ) -> None:
        n_latents, d_model = W_dec.shape
        if not 0 < k <= n_latents:
            raise ValueError(f"k={k} with n_latents={n_latents}; choose 1 <= k <= n_latents")
        self.n_latents, self.d_model, self.k = n_latents, d_model, k
        self.k_aux, self.aux_coefficient, self.dead_after_tokens = k_aux, aux_coefficient, dead_after_tokens
        self.betas, self.eps, self.product_dtype, self.backend = betas, eps, product_dtype, backend
        self._rows_enc = W_enc.detach().float().t().clone(memory_format=torch.contiguous_format)
        self.W_dec = W_dec.detach().float().clone(memory_format=torch.contiguous_format)
        self.b_enc, self.b_dec = b_enc.detach().float().clone(), b_dec.detach().float().clone()
        self._first = [torch.zeros_like(p) for p in self._parameters()]
        self._second = [torch.zeros_like(p) for p in self._parameters()]
        self.steps = 0
        self.tokens_since_fired: Int[Tensor, " n_latents"] = torch.zeros(
            n_latents, dtype=torch.int64, device=W_dec.device
        )
        on_cpu = W_dec.device.type == "cpu" and product_dtype == torch.bfloat16
        if backend == "cpu" and not (on_cpu and library()):
            raise ValueError(
                "backend=cpu needs CPU tensors, product_dtype=bfloat16, AVX2 with FMA and a compiler; use auto"
            )
        own = (list(self._parameters()), self._first, self._second)
        self._kernels: PlainStep | CpuStep | TritonStep
        if backend == "triton" or (backend == "auto" and W_dec.is_cuda and product_dtype == torch.bfloat16):
            from sae_kernels import triton_step  # imports Triton, which only a GPU needs

            self._kernels = triton_step.TritonStep(*own)
        elif backend != "torch" and on_cpu and library():
            self._kernels = CpuStep(*own, screen=screen)
        else:
            self._kernels = PlainStep(*own, product_dtype=product_dtype)

    @property
    def backend_used(self) -> Backend:
        """What `auto` came to."""
        match self._kernels:
            case PlainStep():
                return "torch"
            case CpuStep():
                return "cpu"
            case _:
                return "triton"

    @property
    def stages(self) -> Stages:
        """The step's parts one by one, on the same tensors: for a trainer that exchanges something between them."""
        return self._kernels

    @property
    def screened(self) -> Screened | None:
        """How many rows the int16 screen could not certify, where the CPU kernels may use it."""
        return self._kernels.screened if isinstance(self._kernels, CpuStep) else None

    @property
    def W_enc(self) -> Float[Tensor, "d_model n_latents"]:
        return self._rows_enc.t()

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Latents that AuxK trains in the next step."""
        return self.tokens_since_fired >= self.dead_after_tokens

    def step(
        self, x: Float[Tensor, "batch d_model"], *, lr: float, variance: float | Float[Tensor, ""]
    ) -> StepStatistics:
        """One optimiser step on `topk_loss`; when the squared error is not finite, nothing but the counters changes."""
        statistics = self.forward(x, variance=variance)
        if bool(torch.isfinite(statistics.squared_error)):
            self.update_(None, lr=lr)
        self.count_(statistics.fired, tokens=x.shape[0])
        return statistics

    def gradients(
        self, x: Float[Tensor, "batch d_model"], *, variance: float | Float[Tensor, ""]
    ) -> tuple[Gradients, StepStatistics]:
        """Gradients of `topk_loss` at the present parameters, dense, for a trainer that reduces them over ranks."""
        statistics = self.forward(x, variance=variance)
        return self.stored_gradients(), statistics

    def stored_gradients(self) -> Gradients:
        """The dense gradients of the last `forward`."""
        return self._kernels.gradients()

    def forward(self, x: Float[Tensor, "batch d_model"], *, variance: float | Float[Tensor, ""]) -> StepStatistics:
        """The first half of `step`: everything up to what `update_(None)` needs, which is kept until then."""
        return self._kernels.forward(
            x, k=self.k, variance=float(variance), dead=self.dead, k_aux=self.k_aux,
            aux_coefficient=self.aux_coefficient,
        )  # fmt: skip

    def update_(self, gradients: Gradients | None, *, lr: float) -> None:
        """Adam on the four parameters; decoder rows lose the gradient along themselves and keep norm 1.

        Without gradients those of the last `forward` are used, and never stored.
        """
        self._kernels.update_(gradients, **self.hyper_(lr)._asdict())

    def hyper_(self, lr: float) -> Hyper:
        """Begin the next update: its number, and Adam's other numbers."""
        self.steps += 1
        return Hyper(self.steps, lr, self.betas, self.eps)

    def count_(self, fired: Bool[Tensor, " n_latents"], *, tokens: int) -> None:
        """Count `tokens` of silence for every latent that did not fire; ranks count the union and the sum."""
        self.tokens_since_fired.add_(tokens).masked_fill_(fired, 0)

    def encode(self, x: Float[Tensor, "batch d_model"]) -> Selected:
        """`reference.topk_encode` at the present parameters."""
        return self._kernels.encode(x, k=self.k)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as plain tensors that share memory with this object."""
        names = ("W_enc", "W_dec", "b_enc", "b_dec")
        tensors = dict(zip(names, self._parameters(), strict=True))
        tensors |= {f"first.{name}": moment for name, moment in zip(names, self._first, strict=True)}
        tensors |= {f"second.{name}": moment for name, moment in zip(names, self._second, strict=True)}
        for name in ("W_enc", "first.W_enc", "second.W_enc"):
            tensors[name] = tensors[name].t()
        return tensors | {
            "tokens_since_fired": self.tokens_since_fired,
            "steps": torch.tensor(self.steps, dtype=torch.int64),
        }

    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, by value."""
        own = self.state_dict()
        if own.keys() != tensors.keys():
            raise ValueError(f"the state differs in its keys: {sorted(own.keys() ^ tensors.keys())}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(f"{name} is {list(tensors[name].shape)} and must be {list(tensor.shape)}")
            tensor.copy_(tensors[name])
        self.steps = int(tensors["steps"])
        self._kernels.refresh_()

    def _parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._rows_enc, self.W_dec, self.b_enc, self.b_dec
