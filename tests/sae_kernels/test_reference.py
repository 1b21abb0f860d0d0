"""The specification itself, against numbers worked by hand and finite differences."""

import torch
from sae_kernels import reference


def test_topk_breaks_ties_by_the_lower_index_and_never_takes_nan():
    z = torch.tensor([[1.0, 3.0, float("nan"), 3.0, 1.0, -2.0]])
    values, indices = reference.topk(z, 3)
    assert values.tolist() == [[3.0, 3.0, 1.0]]
    assert indices.tolist() == [[1, 3, 0]]


def test_batch_topk_takes_the_largest_of_the_whole_batch():
    z = torch.tensor([[5.0, 1.0, 4.0], [2.0, -1.0, 2.0], [-3.0, -1.0, -2.0]])
    active = reference.batch_topk(z, 1)
    assert active.values.tolist() == [5.0, 4.0, 2.0]
    assert active.indices.tolist() == [0, 2, 0]
    assert active.offsets.tolist() == [0, 2, 3, 3]


def test_batch_topk_of_a_batch_without_enough_positives_takes_them_all():
    active = reference.batch_topk(torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), 2)
    assert active.values.tolist() == [1.0]
    assert active.offsets.tolist() == [0, 1, 1]


def test_threshold_keeps_what_is_above_it_and_decodes():
    z = torch.tensor([[0.5, 2.0, 3.0], [0.1, 0.2, 0.3]])
    active = reference.threshold(z, torch.tensor([0.4, 2.0, 0.3]))
    assert active.values.tolist() == [3.0, 0.5]
    assert active.offsets.tolist() == [0, 2, 2]
    W_dec, b_dec = torch.eye(3), torch.ones(3)
    assert reference.active_decode(active, W_dec, b_dec).tolist() == [[1.5, 1.0, 4.0], [1.0, 1.0, 1.0]]


def test_jumprelu_and_its_l0_have_the_box_gradients():
    z = torch.tensor([[0.95, 1.05, 2.0, -1.0]], requires_grad=True)
    theta = torch.tensor([1.0, 1.0, 1.0, 1.0], requires_grad=True)
    values, gate = reference.jumprelu(z, theta, bandwidth=0.2)
    l0 = gate.sum(-1)
    assert values.tolist() == torch.tensor([[0.0, 1.05, 2.0, 0.0]]).tolist()
    assert l0.tolist() == [2.0]
    z_gradient, theta_gradient = torch.autograd.grad(values.sum(), (z, theta), retain_graph=True)
    assert z_gradient.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert theta_gradient.tolist() == [-5.0, -5.0, 0.0, 0.0]
    assert torch.autograd.grad(l0.sum(), theta)[0].tolist() == [-5.0, -5.0, 0.0, 0.0]


def test_the_ordered_product_is_the_product():
    x, W_enc = torch.randn(7, 19), torch.randn(19, 30)
    b_enc, b_dec = torch.randn(30), torch.randn(19)
    ordered = reference.ordered_pre_activations(x, W_enc, b_enc, b_dec)
    exact = reference.pre_activations(x, W_enc, b_enc, b_dec, product_dtype=torch.bfloat16)
    torch.testing.assert_close(ordered, exact, rtol=1e-5, atol=1e-5)


def test_gather_dot_is_the_product_at_the_indices():
    e, W_dec, indices = torch.randn(4, 6), torch.randn(9, 6), torch.randint(9, (4, 3))
    torch.testing.assert_close(reference.gather_dot(e, W_dec, indices), (e @ W_dec.t()).gather(1, indices))
