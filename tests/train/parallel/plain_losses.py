"""The loss of every kind as its paper writes it: dense, in fp64, differentiated by autograd."""

import torch
from sae_kernels import reference
from torch import Tensor

from sae_dist.sae.config import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    JumpReLUTanh,
    Matryoshka,
    MatryoshkaTopK,
    MultiTopK,
    PAnneal,
    ReLU,
    ReLUNorm,
)
from sae_dist.sae.variants.p_anneal import LEAST
from tests.train.parallel.mesh_steps import Case, batch_of, parameters, target_of, vectors


def by_autograd(case: Case) -> dict[str, Tensor]:
    """Gradients of the first step; b_in is a constant, and every second latent is dead."""
    given = {name: tensor.double() for name, tensor in (parameters(case) | vectors(case)).items()}
    x, target, b_in = batch_of(case, 0).double(), target_of(case, 0), given.pop("b_in", None)
    target = x if target is None else target.double()
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    centre = leaves["b_dec"] if b_in is None else b_in
    p, latents = dict(leaves), torch.arange(case.n_latents)
    if case.blocks is not None:  # what is outside does not exist
        p["W_enc"] = p["W_enc"] * case.blocks.enc_(torch.ones(case.n_latents, x.shape[1]), latents).t()
        p["W_dec"] = p["W_dec"] * case.blocks.dec_(torch.ones(case.n_latents, target.shape[1]), latents)
    if case.skip:
        assert b_in is not None
        target = target - (x - b_in) @ leaves["W_skip"]
    z = reference.pre_activations(x, p["W_enc"], p["b_enc"], centre)
    squared, residual, cost = errors_and_cost(case, z, target, p)
    aux, dead = torch.zeros(()), torch.arange(case.n_latents) % 2 == 0
    if case.data == "integers":
        aux = reference.aux_k(residual, z, p["W_dec"], dead, k_aux=case.k_aux)
    loss = (squared + aux / 32) / (case.batch * case.variance) + cost
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def errors_and_cost(case: Case, z: Tensor, target: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The squared errors in the loss, summed over the batch; target less reconstruction; the penalty."""
    sae, free = case.sae, torch.zeros((), dtype=torch.float64)
    norms = p["W_dec"].unflatten(1, (case.sites, -1)).norm(dim=2).sum(1)  # of a latent, summed over sites

    def left(values: Tensor) -> Tensor:
        return target - values @ p["W_dec"] - p["b_dec"]

    def l1(cost: Tensor) -> Tensor:
        return cost.sum() / (case.batch * (case.variance * target.shape[1]) ** 0.5)

    match sae:
        case JumpReLU():
            values, gate = reference.jumprelu(z, p["threshold"], bandwidth=sae.bandwidth)
            cost = sae.l0_coefficient * (gate.sum() / case.batch / case.k - 1).square()
        case PAnneal():
            values = z.relu()
            powers = torch.where(z > 0, (values + LEAST).pow(sae.p_end) - LEAST**sae.p_end, 0.0).sum()
            cost = sae.l1_coefficient * l1(values).detach() * powers / powers.detach()
        case ReLU():
            values = z.relu()
            norm = norms if isinstance(sae, ReLUNorm) else 1.0
            cost = sae.l1_coefficient * l1(values * norm)
        case Gated():
            gate = p["log_gain"].exp() * (z - p["threshold"])
            values = torch.where(gate > 0, z.relu(), 0.0)
            frozen = target - gate.relu() @ p["W_dec"].detach() - p["b_dec"].detach()
            residual = left(values)
            return residual.square().sum() + frozen.square().sum(), residual, sae.l1_coefficient * l1(gate.relu())
        case JumpReLUTanh():
            theta, norm = p["threshold"].relu(), norms
            values = z * Heaviside.apply(z - theta, sae.bandwidth)
            cost = sae.tanh_coefficient * (sae.tanh_scale * values * norm).tanh().sum()
            cost = (cost + sae.silence_coefficient * ((theta - z).relu() * norm).sum()) / case.batch / target.shape[1]
        case AbsTopK():
            values = torch.where(ranks(z.abs()) < sae.k, z, 0.0)
            cost = free
        case MultiTopK():
            few, many = (torch.where(ranks(z.relu()) < k, z.relu(), 0.0) for k in (sae.k, sae.rule.k))
            residual = left(few)
            return residual.square().sum() + sae.wide_weight * left(many).square().sum(), residual, free
        case MatryoshkaTopK():
            values = top(case, z, over_batch=isinstance(sae, Matryoshka))
            ends = [int(share * sae.n_latents) for share in sae.prefixes]
            residuals = [left(values * (torch.arange(sae.n_latents) < end)) for end in ends]
            return sum((r.square().sum() for r in residuals), free) / len(ends), residuals[-1], free
        case _:
            values, cost = top(case, z, over_batch=isinstance(sae, BatchTopK)), free
    residual = left(values)
    return residual.square().sum(), residual, cost


def top(case: Case, z: Tensor, *, over_batch: bool) -> Tensor:
    """relu(z) where it is among the k largest of its row, or the batch * k largest of all."""
    z = z.relu()
    order = ranks(z.flatten()[None]).view_as(z) if over_batch else ranks(z)
    return torch.where(order < case.k * (len(z) if over_batch else 1), z, 0.0)


def ranks(z: Tensor) -> Tensor:
    """How many of its row come before each number: larger ones, and equal ones to its left."""
    order = z.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(z.shape[1]).expand_as(order))


class Heaviside(torch.autograd.Function):
    """1 where positive; its slope is 1 / width within half a width of 0."""

    @staticmethod
    def forward(ctx, x, width):
        ctx.save_for_backward(x)
        ctx.width = width
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (x,), (grad,) = ctx.saved_tensors, grads
        return torch.where((x / ctx.width).abs() < 0.5, grad / ctx.width, 0.0), None
