"""Steps of every kind of dictionary, and of those that rebuild something else: gradients are autograd's."""

import dataclasses

import pytest
import torch
from sae_kernels.shard import Shard

from sae_dist.sae.config import PAnneal, ReLU, ReLUNorm
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.step import MeshStep
from tests.sae_kernels.test_shard import BACKENDS
from tests.train.parallel.mesh_steps import CASES, EXACT, EXACT_KINDS, OTHER_KINDS, Case, batch_of, parameters, train
from tests.train.parallel.plain_losses import by_autograd
from tests.train.parallel.test_step import on_mesh, whole

TRANSCODERS = ["transcoder", "transcoder_batch", "transcoder_jump", "skip", "skip_nested"]
ONE = ["cross_layer", "cross_layer_batch", *TRANSCODERS, *EXACT_KINDS, *OTHER_KINDS]


def check(found: dict[str, torch.Tensor], case: Case) -> None:
    expected = by_autograd(case)
    assert found.keys() == expected.keys() and all(bool(gradient.any()) for gradient in expected.values())
    for name, gradient in expected.items():
        most = 1e-10 if case.data == "integers" else 2e-6 * float(gradient.abs().max())  # tanh and norms are rounded
        assert float((found[name].double() - gradient).abs().max()) < most, name


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_rank_are_those_of_autograd_in_double_precision(name, backend):
    exact = CASES[name].data == "integers"  # and not rounded by the product either
    if not exact and backend != "torch":
        pytest.skip("its kernels round operands to bf16")
    case = dataclasses.replace(CASES[name], backend=backend, steps=1)
    if exact:
        case = dataclasses.replace(case, product_dtype=torch.bfloat16)
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


@pytest.mark.parametrize("kind, costs_the_same", [(ReLUNorm, True), (ReLU, False)])
def test_the_norm_weighted_price_alone_does_not_change_when_a_latent_is_scaled(kind, costs_the_same):
    case = Case(kind=kind, k=8, k_aux=0, options={"l1_coefficient": 0.5})
    given, x = parameters(case), batch_of(case, 0)
    scaled = {name: tensor.clone() for name, tensor in given.items()}
    for name, factor in {"W_enc": 4.0, "b_enc": 4.0, "W_dec": 0.25}.items():  # encoders up, decoders down
        scaled[name] *= factor
    found = []
    for tensors in (given, scaled):
        keys = dict(k=case.k, k_aux=0, aux_coefficient=0.0, dead_after_tokens=100, product_dtype=torch.float32)
        step = MeshStep(Shard(**tensors, **keys, unit=False), Mesh.single(), sae=case.sae, k_aux=0)
        error = step.forward(x, variance=case.variance, progress=1.0).squared_error
        assert step.penalty is not None
        found.append((float(error), float(step.penalty.value)))
    (error, price), (error_scaled, price_scaled) = found
    assert error_scaled == pytest.approx(error, rel=1e-5)
    assert price_scaled == pytest.approx(price if costs_the_same else 4 * price, rel=1e-5)


def test_while_p_falls_the_price_stays_that_of_l1_and_moves_to_small_values():
    case = Case(kind=PAnneal, k=8, k_aux=0, options={"l1_coefficient": 0.5})
    x, prices, slopes = batch_of(case, 0), [], []
    for p_end in (1.0, 0.2):
        sae = dataclasses.replace(case.sae, p_end=p_end)
        assert isinstance(sae, PAnneal)
        keys = dict(k=case.k, k_aux=0, aux_coefficient=0.0, dead_after_tokens=100, product_dtype=torch.float32)
        step = MeshStep(Shard(**parameters(case), **keys), Mesh.single(), sae=sae, k_aux=0)
        step.forward(x, variance=case.variance, progress=1.0)
        assert step.penalty is not None
        prices.append(float(step.penalty.value))
        z = torch.tensor([0.1, 5.0], requires_grad=True)
        cost = sae.activate(z, {}).cost
        assert cost is not None
        slopes.append(torch.autograd.grad(cost.sum(), z)[0])
    assert prices[1] == pytest.approx(prices[0], rel=1e-6) and prices[0] > 0
    assert float(slopes[0][0] / slopes[0][1]) == pytest.approx(1) and float(slopes[1][0] / slopes[1][1]) > 10
