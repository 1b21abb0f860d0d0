"""Every operation in plain torch, one function an equation: the specification that fast versions are tested against.

Notation: x [batch, d_model] is the scaled input, W_enc [d_model, n_latents], W_dec [n_latents, d_model];
latents are selected per row, (values, indices) [batch, k], values in descending order, ties by the lower index.
A NaN pre-activation is never selected; a NaN in x shows in the squared error.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EMPTY = -1  # the index of a place without a latent


class Selected(NamedTuple):
    """The chosen latents of every row, with values of any sign; an empty place has the index -1 and the value 0."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]

    @property
    def there(self) -> Bool[Tensor, "batch k"]:
        """Where places are not empty."""
        return self.indices >= 0

    def among(self, latents: Int[Tensor, " some"]) -> "Selected":
        """The same, whose indices count within `latents`, by their numbers."""
        return Selected(self.values, torch.where(self.there, latents[self.indices], EMPTY))


class Active(NamedTuple):
    """The active latents of a batch whose rows have different numbers of them: row r owns offsets[r]:offsets[r + 1]."""

    values: Float[Tensor, " active"]  # descending within a row, ties by the lower index; all positive
    indices: Int[Tensor, " active"]
    offsets: Int[Tensor, " batch+1"]

    @property
    def rows(self) -> Int[Tensor, " active"]:
        """The row of each."""
        numbers = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return torch.repeat_interleave(numbers, self.offsets.diff())


class Gradients(NamedTuple):
    """Gradients of the loss of `topk_gradients`, in the shapes of the parameters."""

    W_enc: Float[Tensor, "d_model n_latents"]
    W_dec: Float[Tensor, "n_latents d_model"]
    b_enc: Float[Tensor, " n_latents"]
    b_dec: Float[Tensor, " d_model"]


class StepStatistics(NamedTuple):
    """Sums over the batch, so that ranks add them before they divide."""

    squared_error: Float[Tensor, ""]  # sum ||x - x_hat||^2
    aux_squared_error: Float[Tensor, ""]  # sum ||e - e_hat||^2 over the batch; 0 when nothing is dead
    active: Float[Tensor, ""]  # number of non-zero values
    fired: Int[Tensor, " n_latents"]  # rows on which each latent has a non-zero value


def pre_activations(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    product_dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch n_latents"]:
    """z = (x - b_dec) W_enc + b_enc (Gao et al. 2024, eq. 1).

    `product_dtype` rounds the two operands of the product; sums stay in x's dtype and gradients pass the rounding by.
    The order of a row's sum is the library's; `ordered_pre_activations` fixes it, for comparisons bit by bit.
    """
    return _rounded(x - b_dec, product_dtype) @ _rounded(W_enc, product_dtype) + b_enc


def ordered_pre_activations(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
) -> Float[Tensor, "batch n_latents"]:
    """`pre_activations` with bf16 operands and fp32 sums in one fixed order: the z of the CPU kernels, bit for bit.

    From 0, the products of dimensions 1, 0, 3, 2, 5, 4, ... are added one by one (a missing last one counts as zero),
    then b_enc. A product of two bf16 numbers is exact in fp32, so every addition rounds once, which is what the
    processors' bf16 dot product (vdpbf16ps) does on its pairs (subnormal numbers aside: it takes them for zero).
    """
    x_rounded, W_rounded = (x - b_dec).bfloat16().float(), W_enc.bfloat16().float()
    z = x.new_zeros(x.shape[0], W_enc.shape[1])
    for pair in range(0, x.shape[1], 2):
        for dim in range(min(pair + 1, x.shape[1] - 1), pair - 1, -1):
            z += x_rounded[:, dim, None] * W_rounded[dim]
    return z + b_enc


def _rounded(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == a.dtype:
        return a
    return a + (a.to(dtype).to(a.dtype) - a).detach()  # exact: the difference of neighbours is representable


def topk(z: Float[Tensor, "batch n_latents"], k: int) -> Selected:
    """The k largest of relu(z) per row, descending, ties by the lower index (TopK; Gao et al. 2024, sec. 2.3)."""
    values, indices = (a[:, :k].contiguous() for a in torch.sort(_relu(z), dim=-1, descending=True, stable=True))
    return Selected(values, torch.where(values > 0, indices, EMPTY))


def batch_topk(z: Float[Tensor, "batch n_latents"], k: int) -> Active:
    """The batch * k largest of relu(z) over the batch (BatchTopK; Bussmann et al. 2024), ties by row, then latent."""
    flat = _relu(z).flatten()
    _, order = torch.sort(flat.detach(), descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order[: z.shape[0] * k]] = True
    return _active(z, chosen.view_as(z) & (z > 0))


def threshold(z: Float[Tensor, "batch n_latents"], theta: Float[Tensor, " n_latents"]) -> Active:
    """z where z > theta, for theta >= 0 (JumpReLU; Rajamanoharan et al. 2024, eq. 3; BatchTopK at inference)."""
    return _active(z, (z > theta) & (z > 0))


def jumprelu(
    z: Float[Tensor, "..."], theta: Float[Tensor, "..."], *, bandwidth: float
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """JumpReLU(z) = z H(z - theta) and the gate H(z - theta), elementwise, both differentiable in theta.

    Their gradients replace the step's delta by a box of width `bandwidth` (Rajamanoharan et al. 2024, eqs. 11 and 12):
    d/dtheta = -theta / bandwidth for the value and -1 / bandwidth for the gate where |z - theta| < bandwidth / 2, else
    0. Where z <= 0 there is none either: a threshold below half the bandwidth would have all silent latents in the box.
    A theta below 0 counts as 0 in the values, and can still rise by the gate.
    """
    gate = ((z > theta) & (z > 0)).to(z.dtype)
    near = (((z - theta).abs() < bandwidth / 2) & (z > 0)).to(z.dtype).detach()
    box = near * (theta - theta.detach()) / bandwidth  # 0 in value, carries the gradient
    return _relu(z) * gate - theta.detach().clamp_min(0) * box, gate - box


def _relu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, torch.zeros_like(z))  # NaN counts as inactive


def _active(z: Float[Tensor, "batch n_latents"], chosen: Bool[Tensor, "batch n_latents"]) -> Active:
    _, order = torch.sort(torch.where(chosen, z, torch.zeros_like(z)).detach(), dim=-1, descending=True, stable=True)
    rows, places = torch.nonzero(chosen.gather(1, order), as_tuple=True)
    indices = order[rows, places]
    offsets = torch.nn.functional.pad(chosen.sum(-1).cumsum(0), (1, 0))
    return Active(z[rows, indices], indices, offsets)


def packed(selected: Selected) -> Active:
    """The same latents without empty places."""
    inside = selected.there
    offsets = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))
    return Active(selected.values[inside], selected.indices[inside], offsets)


def padded(active: Active) -> Selected:
    """The same latents with as many places a row as the fullest one needs, one at least; empty ones last."""
    counts = active.offsets.diff()
    most = max(1, int(counts.max())) if len(counts) else 1
    inside = torch.arange(most, device=counts.device) < counts[:, None]
    values = active.values.new_zeros(inside.shape).masked_scatter(inside, active.values)
    return Selected(values, active.indices.new_full(inside.shape, EMPTY).masked_scatter(inside, active.indices))


def topk_encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    product_dtype: torch.dtype | None = None,
) -> Selected:
    """TopK(relu((x - b_dec) W_enc + b_enc))."""
    return topk(pre_activations(x, W_enc, b_enc, b_dec, product_dtype=product_dtype), k)


def sparse_decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    b_dec: Float[Tensor, " d_model"],
) -> Float[Tensor, "batch d_model"]:
    """x_hat = sum_j values_j W_dec[indices_j] + b_dec."""
    return torch.einsum("bk,bkd->bd", values, W_dec[indices]) + b_dec


def active_decode(
    active: Active, W_dec: Float[Tensor, "n_latents d_model"], b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch d_model"]:
    """x_hat = sum over a row's active latents of value * W_dec[index], + b_dec."""
    x_hat = b_dec.expand(len(active.offsets) - 1, -1)
    return x_hat.index_add(0, active.rows, active.values[:, None] * W_dec[active.indices])


def gather_dot(
    e: Float[Tensor, "batch d_model"], W_dec: Float[Tensor, "n_latents d_model"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """e . W_dec[indices]: the entries of e W_dec^T at the active latents, which is all a sparse backward needs."""
    return torch.einsum("bd,bkd->bk", e, W_dec[indices])


def aux_k(
    residual: Float[Tensor, "batch d_model"],
    z: Float[Tensor, "batch n_latents"],
    W_dec: Float[Tensor, "n_latents d_model"],
    dead: Bool[Tensor, " n_latents"],
    *,
    k_aux: int,
) -> Float[Tensor, ""]:
    """AuxK, sum ||e - e_hat||^2: e_hat is the best k_aux dead latents' reconstruction of e (Gao et al. 2024, App. A.2).

    `residual` is a constant: only dead latents are trained. Zero when none is dead.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_zeros(())
    selected = topk(z[:, dead], min(k_aux, n_dead))
    e_hat = torch.einsum("bk,bkd->bd", selected.values, W_dec[dead][selected.indices])
    return (residual.detach() - e_hat).square().sum()


def error_scale(batch: int, variance: float) -> float:
    """What multiplies x - x_hat in d loss / d x_hat, of a loss of sum ||x - x_hat||^2 / (batch * variance)."""
    return -2 / (batch * variance)


def aux_weight(coefficient: float, *, n_dead: int, k_aux: int) -> float:
    """Weight of AuxK's squared error beside the reconstruction's (Gao et al. 2024, App. A.2).

    The scale by `n_dead` keeps a handful of dead latents from chasing all of the error.
    """
    return coefficient * min(n_dead / k_aux, 1.0) if k_aux else 0.0


def topk_loss(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    W_dec: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    variance: Float[Tensor, ""],
    dead: Bool[Tensor, " n_latents"],
    k_aux: int,
    aux_coefficient: float,
    product_dtype: torch.dtype | None = None,
    over: Literal["row", "batch"] = "row",
) -> tuple[Float[Tensor, ""], StepStatistics]:
    """Loss of a dictionary with AuxK, differentiable in the four parameters: TopK `over` a row, BatchTopK over a batch.

    loss = [ sum ||x - x_hat||^2 + aux_coefficient * min(n_dead / k_aux, 1) * sum ||e - e_hat||^2 ] / (batch * variance)

    `variance`, a constant, is the mean over rows of ||x - mean(x)||^2: both terms are fractions of variance unexplained
    (Gao et al. 2024, sec. 2.1 and App. A.2).
    """
    z = pre_activations(x, W_enc, b_enc, b_dec, product_dtype=product_dtype)
    values, indices = topk(z, k) if over == "row" else padded(batch_topk(z, k))
    x_hat = sparse_decode(values, indices, W_dec, b_dec)
    residual = x - x_hat
    squared_error = residual.square().sum()
    aux = aux_k(residual, z, W_dec, dead, k_aux=k_aux)
    weight = aux_weight(aux_coefficient, n_dead=int(dead.sum()), k_aux=k_aux)
    loss = (squared_error + weight * aux) / (x.shape[0] * variance)
    fired = torch.bincount(indices[indices >= 0], minlength=W_dec.shape[0])
    return loss, StepStatistics(squared_error.detach(), aux.detach(), (indices >= 0).sum(), fired)


def topk_gradients(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model n_latents"],
    W_dec: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_model"],
    *,
    k: int,
    variance: Float[Tensor, ""],
    dead: Bool[Tensor, " n_latents"],
    k_aux: int,
    aux_coefficient: float,
    product_dtype: torch.dtype | None = None,
    over: Literal["row", "batch"] = "row",
) -> tuple[Gradients, StepStatistics]:
    """Gradients of `topk_loss` by autograd: what every fast version must equal."""
    with torch.enable_grad():
        parameters = [p.detach().requires_grad_() for p in (W_enc, W_dec, b_enc, b_dec)]
        loss, statistics = topk_loss(
            x, *parameters, k=k, variance=variance, dead=dead, k_aux=k_aux,
            aux_coefficient=aux_coefficient, product_dtype=product_dtype, over=over,
        )  # fmt: skip
        return Gradients(*torch.autograd.grad(loss, parameters)), statistics


def remove_parallel(
    gradient: Float[Tensor, "n_latents d_model"], W_dec: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, "n_latents d_model"]:
    """The gradient without its part along each unit decoder row, which `unit_norm` would undo (Bricken et al. 2023)."""
    return gradient - (gradient * W_dec).sum(-1, keepdim=True) * W_dec


def unit_norm(W_dec: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, "n_latents d_model"]:
    """Decoder rows scaled to norm 1."""
    return W_dec / W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def adam_(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor,
    *, step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 6.25e-10,
) -> None:  # fmt: skip
    """One Adam step in place on the parameter and its moments (Kingma & Ba 2015, alg. 1); `step` counts from 1."""
    beta1, beta2 = betas
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    first_hat = first / (1 - beta1**step)
    second_hat = second / (1 - beta2**step)
    parameter.addcdiv_(first_hat, second_hat.sqrt_().add_(eps), value=-lr)
