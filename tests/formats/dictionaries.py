"""Small dictionaries of every way of choosing latents, and the reconstruction by the formula of design.md, in fp64."""

import torch
from torch import Tensor

from sae_dist.sae.blocks import Blocks
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters

D, N, K = 12, 40, 5
ROWS = 3 + torch.randn(64, D, generator=torch.Generator().manual_seed(9))  # far from the origin
UNIT = ("topk", "abs_topk", "batchtopk", "matryoshka", "gated", "jumprelu", "relu")


def dictionary(variant: str, *, transcodes: bool = False, skip: bool = False) -> Dictionary:
    """One with random weights, of hook point resid_post.3, or resid_pre.3 -> mlp_out.3."""
    g = torch.Generator().manual_seed(len(variant))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    W_dec = draw(N, D)
    if variant in UNIT:
        W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    parameters = Parameters(draw(N, D).T, W_dec, draw(N), 3 + draw(D))
    threshold = {
        "batchtopk": torch.full((N,), 2.0), "matryoshka": torch.full((N,), 2.0), "relu": torch.zeros(N),
        "relu_norm": torch.zeros(N), "jumprelu": draw(N).abs(), "gated": draw(N).relu(), "jumprelu_tanh": draw(N).abs(),
    }.get(variant)  # fmt: skip
    info = {"variant": variant, "hook": "resid_post.3", "model": "gpt2"}
    if transcodes:
        info |= {"hook": "resid_pre.3", "target_hook": "mlp_out.3", "skip": skip}
    b_in, W_skip = 3 + draw(D) if transcodes else None, draw(D, D) if skip else None
    return Dictionary(parameters=parameters, k=K, info=info, threshold=threshold, b_in=b_in, W_skip=W_skip)


LAYERS, WIDTH = 3, D // 3  # of a cross-layer transcoder of as many dimensions


def cross_layer(variant: str, *, n: int = 42) -> Dictionary:
    """One that reads resid_pre.0, .1 and .2, and writes mlp_out of these and of later layers."""
    g = torch.Generator().manual_seed(len(variant))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    blocks, latents = Blocks((WIDTH,) * LAYERS, (WIDTH,) * LAYERS, n), torch.arange(n)
    W_dec = torch.nn.functional.normalize(blocks.dec_(draw(n, D), latents), dim=1)
    parameters = Parameters(blocks.enc_(draw(n, D), latents).T, W_dec, draw(n), draw(D))
    threshold = {"jumprelu": draw(n).abs(), "batchtopk": torch.full((n,), 0.8), "relu": torch.zeros(n)}.get(variant)
    hooks = {key: [f"{kind}.{layer}" for layer in range(LAYERS)] for key, kind in
             (("hook", "resid_pre"), ("target_hook", "mlp_out"))}  # fmt: skip
    info = {"variant": variant, "model": "gpt2", "cross_layer": True, "d_model": D, "d_out": D}
    info |= {key: "+".join(names) for key, names in hooks.items()}
    for key, names in (("sites", hooks["hook"]), ("target_sites", hooks["target_hook"])):
        info[key] = [{"hook": name, "width": WIDTH} for name in names]
    return Dictionary(parameters=parameters, k=K, info=info, threshold=threshold, b_in=3 + draw(D))


def rebuilt(own: Dictionary, x: Tensor = ROWS) -> Tensor:
    """y = f W_dec + b_dec."""
    W_enc, W_dec, b_enc, b_dec = (tensor.double() for tensor in own.parameters)
    z = (x.double() - (b_dec if own.b_in is None else own.b_in.double())) @ W_enc + b_enc
    if own.threshold is not None:
        f = torch.where((z > own.threshold.double()) & (z > 0), z, 0)
    else:
        f = largest(z, K, signed=own.info["variant"] == "abs_topk")
    y = f @ W_dec + b_dec
    return y if own.W_skip is None or own.b_in is None else y + (x.double() - own.b_in) @ own.W_skip.double()


def largest(z: Tensor, k: int, *, signed: bool = False) -> Tensor:
    chosen = (z.abs() if signed else z).topk(k, -1).indices
    return torch.zeros_like(z).scatter(-1, chosen, (z if signed else z.relu()).gather(-1, chosen))
