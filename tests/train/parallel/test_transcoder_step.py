"""Steps of a dictionary that rebuilds something else than its input: its gradients are autograd's, to the last bit."""

import dataclasses

import pytest
import torch
from sae_kernels import reference
from sae_kernels.shard import Shard

from sae_dist.sae.config import BatchTopK, JumpReLU
from sae_dist.train.parallel.mesh import Mesh
from tests.sae_kernels.test_shard import BACKENDS
from tests.train.parallel.mesh_steps import CASES, EXACT, Case, batch_of, parameters, target_of, thresholds, train
from tests.train.parallel.test_step import on_mesh, whole

ONE = ["transcoder", "transcoder_batch", "transcoder_jump"]


def by_autograd(case: Case) -> dict[str, torch.Tensor]:
    """Gradients of the plain, dense loss in fp64, with a constant b_in; every second latent is dead."""
    given = {name: tensor.double() for name, tensor in (parameters(case) | thresholds(case)).items()}
    x, target, b_in = batch_of(case, 0).double(), target_of(case, 0), given.pop("b_in")
    assert target is not None
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    z = reference.pre_activations(x, leaves["W_enc"], leaves["b_enc"], b_in)
    cost = torch.zeros((), dtype=torch.float64)
    if case.kind is JumpReLU:
        sae = JumpReLU(k=case.k)
        values, gate = reference.jumprelu(z, leaves["threshold"], bandwidth=sae.bandwidth)
        cost = sae.l0_coefficient * (gate.sum() / case.batch / case.k - 1).square()
        rebuilt = values @ leaves["W_dec"] + leaves["b_dec"]
    else:
        over_batch = case.kind is BatchTopK
        chosen = reference.padded(reference.batch_topk(z, case.k)) if over_batch else reference.topk(z, case.k)
        rebuilt = reference.sparse_decode(*chosen, leaves["W_dec"], leaves["b_dec"])
    residual, dead = target.double() - rebuilt, torch.arange(case.n_latents) % 2 == 0
    aux = reference.aux_k(residual, z, leaves["W_dec"], dead, k_aux=case.k_aux)
    loss = (residual.square().sum() + aux / 32) / (case.batch * case.variance) + cost
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check(found: dict[str, torch.Tensor], case: Case) -> None:
    expected = by_autograd(case)
    assert found.keys() == expected.keys() and all(bool(gradient.any()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name].double() - gradient).abs().max()) < 1e-10, name


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_rank_are_those_of_autograd_in_double_precision(name, backend):
    case = dataclasses.replace(CASES[name], backend=backend, product_dtype=torch.bfloat16)
    check(train(case, Mesh.single())["gradients"], case)


def test_gradients_of_two_by_two_ranks_are_those_of_autograd_in_double_precision(tmp_path):
    ranks = on_mesh(tmp_path / "2x2", 2, 2, [*ONE, "transcoder_kernels"])
    for name, said in ranks.items():
        for first in (0, 2):  # of each data rank
            check(whole([{"state": rank["gradients"]} for rank in said[first : first + 2]], 2), CASES[name])


def test_the_fused_step_and_one_width_for_two_are_refused():
    given, keys = parameters(EXACT), dict(k=2, k_aux=0, aux_coefficient=0.0, dead_after_tokens=9)
    with pytest.raises(ValueError, match="this dictionary has b_in; take its `stages`"):
        Shard(**given, **keys).step(batch_of(EXACT, 0), lr=1e-3, variance=1.0)
    del given["b_in"]
    with pytest.raises(ValueError, match="W_enc reads 16 dimensions and W_dec writes 12; give b_in"):
        Shard(**given, **keys)
