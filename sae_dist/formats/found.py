"""What lies between a tool's files and a dictionary: tensors as the file has them, with what has to be known of them.

`dictionary` folds it into a dictionary on raw activations. What a file does not say has to be told; nothing is guessed.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_dist.config import UserError, frozen
from sae_dist.sae.dictionary import Dictionary
from sae_dist.sae.initialize import Parameters

LEAST_SCALE, MOST_SCALE = 1e-6, 1e6


@frozen
class Told:
    """What may have to be told of a file that does not say it itself; null leaves it to the file."""

    model: str | None = None  # the language model that the activations are of
    # the hook point that it reads, as sae-dist names it: resid_post.12, or a module path; of a cross-layer transcoder
    # with L in the place of the layer
    hook: str | None = None
    target_hook: str | None = None  # of a transcoder: the hook point that it rebuilds
    k: int | None = None  # latents a token, where the file does not say
    pre_bias: bool | None = None  # whether the file's encoder reads x - b_dec rather than x
    scale: float | None = None  # what the file's encoder multiplies x by first; 1: it reads raw activations
    # whether thresholds are in units of raw activations, or of those that are multiplied by the scale
    threshold_units: Literal["raw", "scaled"] | None = None


class Found(NamedTuple):
    """A dictionary as a file has it: z = (scale x - b_dec if pre_bias) W_enc + b_enc, scale_out y = f W_dec + b_dec.

    With W_skip, scale x W_skip is added to that.
    """

    W_enc: Float[Tensor, "d_in n_latents"]
    W_dec: Float[Tensor, "n_latents d_out"]
    b_enc: Float[Tensor, " n_latents"]
    b_dec: Float[Tensor, " d_out"]
    variant: str  # the kind of ours that chooses in the same way
    pre_bias: bool
    k: int | None = None
    threshold: Float[Tensor, " n_latents"] | None = None  # f = z where z > threshold; None: the k largest of relu(z)
    scale: float = 1.0
    scale_out: float | None = None  # None: as `scale`
    hook: str | None = None
    target_hook: str | None = None
    model: str | None = None
    W_skip: Float[Tensor, "d_in d_out"] | None = None


def dictionary(found: Found, told: Told, *, path: Path, format: str) -> Dictionary:
    """The dictionary on raw activations; UserError where something is not known, contradicts, or cannot be."""
    _check(found, path)
    hook = either("hook", found.hook, told.hook, path)
    target = found.target_hook if told.target_hook is None else told.target_hook
    if found.target_hook is not None:
        target = either("target_hook", found.target_hook, told.target_hook, path)
    if hook is None:
        raise UserError(f"{path} does not say of which hook point it is; tell it: hook=resid_post.12 or a module path")
    model = told.model or found.model
    if model is None:
        raise UserError(f"{path} does not say of which language model it is; tell it: model=...")
    k = either("k", found.k, told.k, path)
    d_in, d_out = len(found.W_enc), len(found.b_dec)
    if target is None and d_in != d_out:
        raise UserError(f"{path} reads {d_in} dimensions and rebuilds {d_out}; tell what it rebuilds: target_hook=...")
    if found.threshold is None and k is None:
        raise UserError(f"{path} does not say how many latents a token it keeps; tell it: k=...")
    if found.threshold is None and k is not None and not 1 <= k <= len(found.b_enc):
        raise UserError(f"{path}: k={k} of {len(found.b_enc)} latents; give a k that is right")
    info: dict[str, Any] = {
        "variant": found.variant, "n_latents": len(found.b_enc), "hook": hook, "d_model": d_in, "model": model,
        "imported": {"format": format, "file": path.name},
    }  # fmt: skip
    if target is not None and target != hook:
        info |= {"target_hook": target, "d_out": d_out}
    if found.W_skip is not None:
        need(info.get("target_hook"), "target_hook", "what it rebuilds, though it has a skip connection", path)
        info["skip"] = True
    return _folded(found, info, k, transcodes="target_hook" in info)


def _folded(found: Found, info: dict[str, Any], k: int | None, *, transcodes: bool) -> Dictionary:
    """Folds scales and the pre-bias: z / t = (x - centre) (s / t) W_enc + b_enc' (interface.py), in fp64."""
    s, t = found.scale, found.scale if found.scale_out is None else found.scale_out
    W_enc, W_dec, b_enc, b_dec = (tensor.double() for tensor in found[:4])
    W_enc, b_enc, b_dec = W_enc * (s / t), b_enc / t, b_dec / t
    if not transcodes and not found.pre_bias:
        b_enc = b_enc + b_dec @ W_enc  # ours reads x - b_dec
    if transcodes and found.pre_bias:
        raise UserError("a transcoder that subtracts the bias of what it rebuilds from what it reads cannot be")
    threshold = None if found.threshold is None else (found.threshold.double() / t).clamp_min(0).float()
    latents_first = W_enc.T.float().contiguous().T
    return Dictionary(
        parameters=Parameters(latents_first, W_dec.float().contiguous(), b_enc.float(), b_dec.float()), k=k, info=info,
        threshold=threshold, b_in=torch.zeros(len(W_enc)) if transcodes else None,
        W_skip=None if found.W_skip is None else (found.W_skip.double() * (s / t)).float().contiguous(),
    )  # fmt: skip


def _check(found: Found, path: Path) -> None:
    """UserError where shapes do not fit together or a number is not finite."""
    (d_in, n), (d_out,) = found.W_enc.shape, found.b_dec.shape
    wanted = {
        "W_enc": (len(found.W_enc), len(found.b_enc)),
        "W_dec": (len(found.b_enc), d_out),
        "W_skip": (d_in, d_out),
    }
    for name, shape in wanted.items():
        if getattr(found, name) is not None and (has := tuple(getattr(found, name).shape)) != shape:
            raise UserError(
                f"{path}: {name} is {list(has)} where the biases say {list(shape)}; it is transposed, or something else"
            )
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip"):
        tensor = getattr(found, name)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} has numbers that are not finite; the file is damaged")
    for scale in (found.scale, found.scale_out or 1.0):
        if not LEAST_SCALE <= scale <= MOST_SCALE:
            raise UserError(
                f"{path}: activations are scaled by {scale:g}, which cannot be; see what the file says of it"
            )
    if d_in < 2 or n < 2:
        raise UserError(f"{path}: {n} latents of {d_in} dimensions are no dictionary")


def either(name: str, own: Any, told: Any, path: Path) -> Any:
    """What the file or the user says; UserError where they contradict."""
    if own is not None and told is not None and own != told:
        raise UserError(f"{name}={told} was told, but {path} says {own}; leave {name} out, or see which is right")
    return own if told is None else told


def need(value: Any, key: str, what: str, path: Path) -> Any:
    """A value that had to be told; UserError that says which key tells it."""
    if value is None:
        raise UserError(f"{path} does not say {what}; tell it: {key}=...")
    return value
