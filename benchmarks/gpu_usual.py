"""A TopK training step as it is usually written, in torch alone: what the kernels are measured against on a GPU.

Dense encoder, `topk`, the decoder as a gather (`embedding_bag`) or as a product with the scattered activations,
autograd, decoder projection and unit norm, fused Adam; bf16 autocast over fp32 parameters. No AuxK.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Decoder = Literal["gather", "dense"]


def usual_step(
    n_latents: int, d_model: int, device: torch.device, *, k: int, decoder: Decoder, compiled: bool
) -> Callable[[Tensor], Tensor]:
    """A function of x [batch, d_model] that does one optimiser step and returns the loss; it owns its parameters."""
    generator = torch.Generator(device).manual_seed(0)
    W_dec = functional.normalize(torch.randn(n_latents, d_model, generator=generator, device=device))
    parameters = [W_dec.clone(), torch.zeros(n_latents, device=device), W_dec, torch.zeros(d_model, device=device)]
    W_enc, b_enc, W_dec, b_dec = (p.requires_grad_() for p in parameters)
    adam = torch.optim.Adam(parameters, lr=1e-4, eps=6.25e-10, fused=True)
    fired = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def loss_of(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            z = functional.relu(functional.linear(x - b_dec, W_enc, b_enc))
            values, indices = z.topk(k, sorted=False)
            if decoder == "gather":
                with torch.autocast(device.type, enabled=False):
                    x_hat = functional.embedding_bag(indices, W_dec, per_sample_weights=values.float(), mode="sum")
            else:
                x_hat = torch.zeros_like(z).scatter(1, indices, values) @ W_dec
        return (x - x_hat.float() - b_dec).square().sum(1).mean() / d_model, indices

    forward = torch.compile(loss_of) if compiled else loss_of

    def step(x: Tensor) -> Tensor:
        loss, indices = forward(x)
        loss.backward()
        with torch.no_grad():
            gradient = W_dec.grad
            assert gradient is not None
            gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec
            adam.step()
            adam.zero_grad(set_to_none=True)
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            fired.add_(len(x)).index_fill_(0, indices.flatten(), 0)
        return loss

    return step
