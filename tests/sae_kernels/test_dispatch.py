import subprocess
import sys

import sae_kernels
import torch
from sae_kernels import reference


def test_importing_the_package_and_its_step_imports_no_triton():
    program = "import sys, sae_kernels, sae_kernels.shard; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_on_a_cpu_the_operations_are_the_references_with_gradients_and_without():
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (torch.randn(s, generator=generator) for s in ((5, 8), (8, 30), (30,)))
    b_dec, W_dec = torch.randn(8, generator=generator), torch.randn(30, 8, generator=generator, requires_grad=True)
    expected = reference.topk_encode(x, W_enc, b_enc, b_dec, k=4)
    for given in (W_enc, W_enc.clone().requires_grad_()):
        ours = sae_kernels.topk_encode(x, given, b_enc, b_dec, k=4)
        assert torch.equal(ours.indices, expected.indices)
        torch.testing.assert_close(ours.values, expected.values)
        assert ours.values.requires_grad == given.requires_grad
    x_hat = sae_kernels.sparse_decode(*expected, W_dec, b_dec)
    torch.testing.assert_close(x_hat, reference.sparse_decode(*expected, W_dec, b_dec))
    assert x_hat.requires_grad
