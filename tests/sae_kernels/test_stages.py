"""Pairs of any sign, empty places anywhere and any number of nested terms: gradients are autograd's, to the last bit.

Whole numbers and powers of 2, of which fp32 and bf16 round none: whatever adds them up must come to what fp64 does.
"""

import pytest
import torch
from sae_kernels import reference
from sae_kernels.reference import EMPTY, Selected
from sae_kernels.shard import Backend, Shard
from sae_kernels.stages import LinearGradients, LossTerm

N_LATENTS, D_IN, D_OUT, BATCH, K, VARIANCE = 24, 7, 5, 8, 6, 4.0
GROUP = torch.arange(N_LATENTS) // 6  # of nested prefixes: a latent of group g is in prefixes g, g + 1, ... 3
BACKENDS = ["torch", "auto", "triton"]


def integers(*shape: int, most: int = 1, seed: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture
def given() -> dict[str, torch.Tensor]:
    return {
        "W_enc": integers(D_IN, N_LATENTS, seed=0), "W_dec": integers(N_LATENTS, D_OUT, seed=1),
        "b_enc": integers(N_LATENTS, seed=2), "b_dec": integers(D_OUT, seed=3), "b_in": integers(D_IN, seed=4),
    }  # fmt: skip


def shard(given: dict[str, torch.Tensor], where: torch.device, backend: Backend) -> Shard:
    tensors = {name: tensor.to(where) for name, tensor in given.items()}
    return Shard(**tensors, k=K, k_aux=0, aux_coefficient=0.0, dead_after_tokens=1, unit=False, backend=backend)


def largest(z: torch.Tensor, device: torch.device) -> Selected:
    """The k largest by size; every third place is empty, amid others, and there is a pair that is worth 0."""
    indices = z.abs().sort(dim=1, descending=True, stable=True).indices[:, :K]
    indices[:, 1::3], indices[0, 0] = EMPTY, z[0].abs().argmin()
    values = torch.where(indices >= 0, z.gather(1, indices.clamp_min(0)), 0.0)
    return Selected(values.float().to(device), indices.to(device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_nested_prefixes_over_values_of_any_sign_are_autograds(device, given, backend):
    where = device if backend == "triton" else torch.device("cpu")
    sae, again = (shard(given, where, backend) for _ in range(2))
    stages = sae.stages
    x, target = integers(BATCH, D_IN, seed=5), integers(BATCH, D_OUT, most=3, seed=6)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in given.items() if name != "b_in"}
    z = reference.pre_activations(x.double(), leaves["W_enc"], leaves["b_enc"], given["b_in"].double())
    chosen, scale = largest(z.detach(), where), reference.error_scale(BATCH, VARIANCE)
    assert bool((chosen.values < 0).any()) and bool(((chosen.values == 0) & chosen.there).any())

    mask = torch.zeros_like(z).scatter_add(1, chosen.indices.cpu().clamp_min(0), chosen.there.cpu().double())
    prefixes = [(z * mask * (p >= GROUP)) @ leaves["W_dec"] + leaves["b_dec"] for p in range(4)]
    loss = sum((target.double() - rebuilt).square().sum() for rebuilt in prefixes) / (BATCH * VARIANCE)
    rest, dead = integers(BATCH, D_OUT, most=3, seed=7), torch.arange(0, N_LATENTS, 5)
    dead_mask = torch.zeros(N_LATENTS, dtype=torch.bool).index_fill_(0, dead, True)
    aux = reference.aux_k(rest.double(), z, leaves["W_dec"], dead_mask, k_aux=3)
    along, shrink = integers(N_LATENTS, most=3, seed=8), integers(N_LATENTS, D_OUT, most=3, seed=9)
    linear = (along * z.mean(0)).sum() + (shrink * leaves["W_dec"].square()).sum() / 2  # a site for each of d_out
    expected = torch.autograd.grad(loss + aux / 8 / (BATCH * VARIANCE) + linear, list(leaves.values()))

    rows, group = stages.rows(x.to(where)), GROUP.to(where)[chosen.indices]
    errors = []
    for p in range(4):
        here = chosen.there & (group <= p)
        prefix = Selected(torch.where(here, chosen.values, 0.0), torch.where(here, chosen.indices, EMPTY))
        errors.append(target.to(where) - stages.partial(prefix) - sae.b_dec)
    suffixes = torch.stack(errors).flip(0).cumsum(0).flip(0).flatten(0, 1)  # one row for each group and row of x
    source = group * BATCH + torch.arange(BATCH, device=where)[:, None]
    nested = LossTerm(suffixes, chosen, stages.d_z(suffixes, chosen, scale=scale, source=source), scale, source=source)
    few = stages.select(rows, k=3, latents=dead.to(where))
    left = rest.to(where) - stages.partial(few)
    second = LossTerm(left, few, stages.d_z(left, few, scale=scale / 8), scale / 8)
    row, mean_z = stages.mean_z(rows)
    assert torch.equal(mean_z.cpu().double(), z.mean(0))
    stages.save_for_backward_(rows, [nested, second], LinearGradients(along.to(where), row, shrink.to(where)))
    enc, dec, b_enc, through = stages.row_gradients()
    assert torch.equal(through.cpu(), given["W_enc"] @ b_enc.cpu())
    found = (enc.t(), dec, b_enc, scale * suffixes[:BATCH].sum(0))
    for name, ours, theirs in zip(leaves, found, expected, strict=True):
        assert float((ours.cpu().double() - theirs).abs().max()) < 1e-10, name
    again.stages.update_latents_(stages.row_gradients(), again.begin_update_(1e-3))
    stages.update_latents_(None, sae.begin_update_(1e-3))
    for name, tensor in again.state_dict().items():  # from pairs as from dense gradients
        torch.testing.assert_close(sae.state_dict()[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
