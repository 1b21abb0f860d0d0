"""Every operation in plain torch, one function an equation: the specification that fast versions are tested against.

Notation: x [batch, d_model] is the scaled input, W_enc [d_model, n_latents], W_dec [n_latents, d_model];
latents are selected per row, (values, indices) [batch, k], values in descending order, ties by the lower index.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Selected(NamedTuple):
    """The active latents of every row; a value of zero is an empty place, whatever its index."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


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
    fired: Bool[Tensor, " n_latents"]  # latents with a non-zero value on some row


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
    """
    return _rounded(x - b_dec, product_dtype) @ _rounded(W_enc, product_dtype) + b_enc


def _rounded(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == a.dtype:
        return a
    return a + (a.to(dtype).to(a.dtype) - a).detach()  # exact: the difference of neighbours is representable


def topk(z: Float[Tensor, "batch n_latents"], k: int) -> Selected:
    """The k largest of relu(z) per row, descending, ties by the lower index (TopK; Gao et al. 2024, sec. 2.3)."""
    values, indices = torch.sort(z.relu(), dim=-1, descending=True, stable=True)
    return Selected(values[:, :k].contiguous(), indices[:, :k].contiguous())


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
) -> tuple[Float[Tensor, ""], StepStatistics]:
    """Loss of a TopK dictionary with AuxK, differentiable in the four parameters.

    loss = [ sum ||x - x_hat||^2 + aux_coefficient * min(n_dead / k_aux, 1) * sum ||e - e_hat||^2 ] / (batch * variance)

    `variance`, a constant, is the mean over rows of ||x - mean(x)||^2: both terms are fractions of variance unexplained
    (Gao et al. 2024, sec. 2.1 and App. A.2; the scale by n_dead keeps a handful of dead latents from chasing all of e).
    """
    z = pre_activations(x, W_enc, b_enc, b_dec, product_dtype=product_dtype)
    selected = topk(z, k)
    x_hat = sparse_decode(selected.values, selected.indices, W_dec, b_dec)
    residual = x - x_hat
    squared_error = residual.square().sum()
    aux = aux_k(residual, z, W_dec, dead, k_aux=k_aux)
    scale = aux_coefficient * min(int(dead.sum()) / k_aux, 1.0) if k_aux else 0.0
    loss = (squared_error + scale * aux) / (x.shape[0] * variance)
    fired = torch.zeros(W_dec.shape[0], dtype=torch.bool, device=x.device)
    fired[selected.indices[selected.values > 0]] = True
    return loss, StepStatistics(squared_error.detach(), aux.detach(), (selected.values > 0).sum(), fired)


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
) -> tuple[Gradients, StepStatistics]:
    """Gradients of `topk_loss` by autograd: what every fast version must equal."""
    with torch.enable_grad():
        parameters = [p.detach().requires_grad_() for p in (W_enc, W_dec, b_enc, b_dec)]
        loss, statistics = topk_loss(
            x, *parameters, k=k, variance=variance, dead=dead, k_aux=k_aux,
            aux_coefficient=aux_coefficient, product_dtype=product_dtype,
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
