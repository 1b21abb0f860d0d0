import pytest
import torch
from sae_kernels import reference, triton_active, triton_ops
from torch._subclasses.fake_tensor import FakeTensorMode


def parameters(n_latents, d_model, device, *, seed=0):
    """W_enc, b_enc, b_dec, W_dec; small integers, so that selections agree bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randint(-2, 3, (n_latents, d_model), generator=generator).float().t()
    b_enc = torch.randint(-1, 2, (n_latents,), generator=generator).float()
    b_dec = torch.randint(-1, 2, (d_model,), generator=generator).float()
    return [t.to(device) for t in (W_enc, b_enc, b_dec, torch.randn(n_latents, d_model, generator=generator))]


def inputs(batch, d_model, device):
    return torch.randint(-2, 3, (batch, d_model), generator=torch.Generator().manual_seed(9)).float().to(device)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("product_dtype", [None, torch.bfloat16])
def test_encoding_and_decoding_match_the_reference_in_values_and_every_gradient(device, product_dtype):
    W_enc, b_enc, b_dec, W_dec = parameters(30, 12, device)
    x = inputs(5, 12, device)
    target = torch.randn(5, 12, generator=torch.Generator().manual_seed(4)).to(device)
    gradients, values = [], []
    for ops in (triton_ops, reference):
        given = leaves(x, W_enc, b_enc, b_dec, W_dec)
        selected = ops.topk_encode(*given[:4], k=4, product_dtype=product_dtype)
        x_hat = ops.sparse_decode(*selected, given[4], given[3])
        gradients.append(torch.autograd.grad((x_hat * target).sum(), given))
        values.append((selected, x_hat))
    (ours, our_x_hat), (theirs, their_x_hat) = values
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.indices[ours.values > 0], theirs.indices[theirs.values > 0])
    torch.testing.assert_close(our_x_hat, their_x_hat)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_operators_keep_their_contract_with_torch(device):
    W_enc, b_enc, b_dec, W_dec = parameters(12, 8, device)
    x, indices = inputs(2, 8, device), torch.tensor([[1, 5], [0, 7]], device=device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(triton_ops._encode, (*leaves(x, W_enc, b_enc, b_dec), None, 2, False), test_utils=checks)
    values = torch.rand(2, 2, device=device)
    torch.library.opcheck(triton_ops._decode, (*leaves(values), indices, *leaves(W_dec, b_dec)), test_utils=checks)
    torch.library.opcheck(triton_ops._gather_dot, (x, W_dec, indices), test_utils=checks[:2])
    torch.library.opcheck(triton_ops._row_gradient, (x, values, indices, 12), test_utils=checks[:2])


def test_fake_tensors_pass_through_without_running_a_kernel():
    with FakeTensorMode():
        x, W_enc = torch.empty(4096, 768), torch.empty(1 << 20, 768).t()
        selected = triton_ops.topk_encode(x, W_enc, torch.empty(1 << 20), torch.empty(768), k=32)
        x_hat = triton_ops.sparse_decode(*selected, torch.empty(1 << 20, 768), torch.empty(768))
    assert selected.values.shape == (4096, 32) and selected.indices.dtype == torch.int64 and x_hat.shape == (4096, 768)


def test_a_compiled_graph_holds_the_operators_whole(device):
    W_enc, b_enc, b_dec, W_dec = parameters(12, 8, device)

    def rebuild(x):
        return triton_ops.sparse_decode(*triton_ops.topk_encode(x, W_enc, b_enc, b_dec, k=3), W_dec, b_dec)

    x = inputs(3, 8, device)
    compiled = torch.compile(rebuild, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), rebuild(x))


def test_a_threshold_or_a_bias_that_is_one_number_expanded_is_read_as_such(device):
    W_enc, b_enc, _, W_dec = parameters(30, 8, device)
    x, one, bias = inputs(4, 8, device), torch.full((1,), 1.5, device=device), torch.full((1,), 2.0, device=device)
    b_dec, theta = bias.expand(8), one.expand(30)
    expected = reference.threshold(reference.pre_activations(x, W_enc, b_enc, b_dec), theta)
    ours = triton_active.threshold_encode(x, W_enc, b_enc, b_dec, theta=theta)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)
    places = torch.zeros(4, 2, dtype=torch.int64, device=device)
    x_hat = triton_ops.sparse_decode(torch.zeros(4, 2, device=device), places, W_dec, b_dec)
    torch.testing.assert_close(x_hat, b_dec.expand(4, 8).clone())


@pytest.mark.parametrize("widest", [5, 2048])
@pytest.mark.parametrize("width", [1, 7])
def test_threshold_selects_what_the_reference_selects_whatever_the_first_width(device, monkeypatch, width, widest):
    monkeypatch.setattr(triton_active, "WIDEST", widest)
    W_enc, b_enc, b_dec, W_dec = parameters(30, 8, device)
    x, theta = inputs(4, 8, device), torch.arange(30, device=device).float() / 4
    expected = reference.threshold(reference.pre_activations(x, W_enc, b_enc, b_dec), theta)
    ours = triton_active.threshold_encode(x, W_enc, b_enc, b_dec, theta=theta, width=width)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)
    x_hat = triton_active.active_decode(ours, W_dec, b_dec)
    torch.testing.assert_close(x_hat, reference.active_decode(expected, W_dec, b_dec))
