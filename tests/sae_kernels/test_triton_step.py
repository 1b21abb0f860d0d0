"""`Shard` with the Triton kernels against the reference, and against itself in plain torch."""

import pytest
import torch
from sae_kernels import cuda_graph, reference, triton_step
from sae_kernels.cuda_graph import SETTLED
from sae_kernels.shard import Shard


def state(n_latents, d_model, k, device, *, backend="triton", dead=0):
    generator = torch.Generator().manual_seed(0)
    W_dec = reference.unit_norm(torch.randn(n_latents, d_model, generator=generator))
    sae = Shard(
        (W_dec + 0.1 * torch.randn(n_latents, d_model, generator=generator)).t().to(device), W_dec.to(device),
        b_enc=0.1 * torch.randn(n_latents, generator=generator).to(device),
        b_dec=0.1 * torch.randn(d_model, generator=generator).to(device),
        k=k, k_aux=3, aux_coefficient=1 / 32, dead_after_tokens=1000, backend=backend,
    )  # fmt: skip
    sae.tokens_since_fired[torch.randperm(n_latents, generator=generator)[:dead].to(device)] = 1000
    return sae


def batch_of(batch, d_model, device):
    return torch.randn(batch, d_model, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize(
    "batch, n_latents, d_model, k, dead",
    [(1, 8, 4, 1, 0), (5, 64, 19, 4, 2), (3, 32, 16, 32, 32), (9, 50, 33, 3, 20), (4, 60, 33, 3, 55)],
)
def test_gradients_match_autograd_in_double_precision(device, monkeypatch, batch, n_latents, d_model, k, dead):
    monkeypatch.setattr(triton_step, "DENSE", 16)  # so that 55 dead for k_aux=3 are many
    sae, x = state(n_latents, d_model, k, device, dead=dead), batch_of(batch, d_model, device)
    gradients, statistics = sae.gradients(x, variance=1.7)
    expected, expected_statistics = reference.topk_gradients(
        x.double(), *(p.double() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)), k=k,
        variance=torch.tensor(1.7), dead=sae.dead, k_aux=3, aux_coefficient=1 / 32, product_dtype=torch.bfloat16,
    )  # fmt: skip
    # fp32 sums of up to batch * k terms; the dead latents' rows, when few, come from products of bf16 operands
    few = 0 < dead <= 16 * 3
    coarse = 2**-7 * few * sae.dead
    enc, dec = ((g * sae.dead).abs().max() for g in (expected.W_enc, expected.W_dec.t()))
    through_encoder = (sae.W_enc.double().abs() * coarse).sum(1) * (expected.b_enc * sae.dead).abs().max()
    extra = (coarse * enc, (coarse * dec)[:, None], coarse * enc, through_encoder)
    for ours, theirs, more in zip(gradients, expected, extra, strict=True):
        tolerance = 2e-5 * theirs.abs() + 2e-6 * (theirs.abs().max() + 1e-6) + more
        assert bool(((ours.double() - theirs).abs() <= tolerance).all())
    assert torch.equal(statistics.fired, expected_statistics.fired)
    assert int(statistics.active) == int(expected_statistics.active)
    for ours, theirs, rtol in zip(statistics[:2], expected_statistics[:2], (1e-5, 2**-7 if few else 1e-5), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=0)


def test_rows_that_do_not_lie_together_are_read_as_what_they_are(device):
    gathered, scattered = state(20, 12, 3, device), state(20, 12, 3, device)
    x = batch_of(5, 12, device)
    for _ in range(SETTLED + 1):  # a recorded step reads a copy
        figures = [sae.forward(given, variance=2.0) for sae, given in ((gathered, x), (scattered, x.t().clone().t()))]
        assert all(torch.equal(a, b) for a, b in zip(*figures, strict=True))


def test_steps_equal_those_in_plain_torch_with_and_without_stored_gradients(device):
    fused, stored, plain = (state(20, 12, 3, device, backend=b, dead=6) for b in ("triton", "triton", "torch"))
    for step in range(2):
        x = batch_of(5, 12, device) + step
        fused.step(x, lr=1e-3, variance=2.0)
        plain.step(x, lr=1e-3, variance=2.0)
        gradients, statistics = stored.gradients(x, variance=2.0)
        stored.update_(gradients, lr=1e-3)
        stored.count_(statistics.fired, tokens=len(x))
    for name, expected in plain.state_dict().items():
        # AuxK's products are bf16, and Adam divides by the root of a second moment, which keeps their relative error
        scale = 2e-4 * float(expected.double().abs().max())
        torch.testing.assert_close(fused.state_dict()[name], expected, rtol=2**-6, atol=scale, msg=name)
        torch.testing.assert_close(stored.state_dict()[name], fused.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)


def test_two_runs_of_a_step_give_the_same_bits(device):
    one, two = (state(20, 12, 3, device, dead=6) for _ in range(2))
    for sae in (one, two):
        sae.step(batch_of(5, 12, device), lr=1e-3, variance=2.0)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recorded on a GPU only")
@pytest.mark.parametrize("dead", [0, 6, 55])
def test_a_recorded_step_gives_the_bits_of_one_that_is_not(device, monkeypatch, dead):
    replayed, launched = state(60, 33, 3, device, dead=dead), state(60, 33, 3, device, dead=dead)
    batches = [torch.randn(9, 33, generator=torch.Generator().manual_seed(s)).to(device) for s in range(SETTLED + 3)]
    batches.append(batches[0][:4])  # another shape goes on without the recording
    for x in batches:
        replayed.step(x, lr=1e-3, variance=2.0)
    monkeypatch.setattr(cuda_graph, "SETTLED", len(batches) + 1)
    for x in batches:
        launched.step(x, lr=1e-3, variance=2.0)
    for name, tensor in replayed.state_dict().items():
        assert torch.equal(tensor, launched.state_dict()[name]), name


def test_encode_selects_what_the_reference_selects(device):
    sae, x = state(50, 16, 5, device), batch_of(6, 16, device)
    ours = sae.encode(x)
    expected = reference.topk_encode(x, sae.W_enc, sae.b_enc, sae.b_dec, k=5, product_dtype=torch.bfloat16)
    assert torch.equal(ours.indices, expected.indices)
    torch.testing.assert_close(ours.values, expected.values, rtol=1e-5, atol=1e-6)
