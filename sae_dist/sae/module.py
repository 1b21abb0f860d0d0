"""A dictionary as a torch module: rows of any leading shape, on any device, in any dtype, with gradients."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_dist.config import UserError
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters

DENSE = 1 << 26  # latents of all rows that `reconstruct` holds at a time: 256 MiB in fp32


class DictionaryModule(nn.Module):
    """x_hat = decode(encode(x)) on raw activations x [..., d_in].

    W_enc [d_in, n_latents], W_dec [n_latents, d_out], b_enc [n_latents], b_dec [d_out], and perhaps threshold
    [n_latents], b_in [d_in] and W_skip [d_in, d_out], are parameters without gradients (`requires_grad_()` gives them
    some). `info` is config.json: variant, model, hook point, provenance.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    b_in: Tensor | None
    W_skip: Tensor | None

    def __init__(self, dictionary: Dictionary) -> None:
        super().__init__()
        tensors = dict.fromkeys(("threshold", "b_in", "W_skip")) | dictionary.parameters._asdict() | dictionary.more
        for name, tensor in tensors.items():
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)
        self._given = dictionary
        self.info, self.k, self.n_latents = dictionary.info, dictionary.k, dictionary.n_latents

    @property
    def hook(self) -> str | None:
        """The hook point that it reads; None where nobody said."""
        return self.info.get("hook")

    @property
    def target_hook(self) -> str | None:
        """The hook point that it rebuilds, where that is another one (a transcoder)."""
        return self.info.get("target_hook")

    @property
    def model(self) -> str | None:
        """The language model whose activations it is for."""
        return self.info.get("model")

    @property
    def dictionary(self) -> Dictionary:
        """The same as lists of active latents, computed without all others: for very many latents. fp32."""
        own = {name: parameter.detach().float() for name, parameter in self.named_parameters()}
        parameters = Parameters(*(own[name] for name in Parameters._fields))
        return dataclasses.replace(self._given, parameters=parameters, **{name: own[name] for name in self._given.more})

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows n_latents"]:
        """The values of all latents, 0 where one is silent; in the dtype and on the device of the weights."""
        d_in = len(self.W_enc)
        if x.shape[-1:] != (d_in,):
            raise UserError(f"x {list(x.shape)} has no rows of {d_in}, which this dictionary reads ({self.hook})")
        z = (x.to(self.W_enc) - (self.b_dec if self.b_in is None else self.b_in)) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return torch.where((z > self.threshold) & (z > 0), z, 0)
        assert self.k is not None
        values, size = (z, z.abs()) if self._given.signed else (z.relu(), z)
        chosen = size.topk(min(self.k, self.n_latents), dim=-1).indices
        return torch.zeros_like(z).scatter(-1, chosen, values.gather(-1, chosen))

    def decode(
        self, f: Float[Tensor, "*rows n_latents"], x: Float[Tensor, "*rows d_in"] | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """x_hat, or the target's rows, from the values of all latents, also from ones that you have changed.

        A dictionary with a skip connection needs x, too.
        """
        rebuilt = f.to(self.W_dec) @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return rebuilt
        if x is None or self.b_in is None:
            raise UserError("this dictionary has a skip connection: give decode(f, x) the x that was encoded, too")
        return rebuilt + (x.to(self.W_skip) - self.b_in) @ self.W_skip

    def reconstruct(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """decode(encode(x), x), some rows at a time, in the dtype of x."""
        parts = x.reshape(-1, x.shape[-1]).split(max(1, DENSE // self.n_latents))
        rebuilt = torch.cat([self.decode(self.encode(part), part).to(x.dtype) for part in parts])
        return rebuilt.reshape(*x.shape[:-1], rebuilt.shape[-1])

    forward = reconstruct

    def extra_repr(self) -> str:
        sizes = f"{len(self.W_enc)} -> {self.n_latents} -> {self.W_dec.shape[1]}"
        hooks = self.hook if self.target_hook is None else f"{self.hook} -> {self.target_hook}"
        return f"{self.info['variant']}, {sizes}, k={self.k}, {hooks} of {self.model}"
