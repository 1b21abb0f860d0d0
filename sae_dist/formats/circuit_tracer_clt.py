"""circuit-tracer (0.5): a cross-layer transcoder, W_enc_L and W_dec_L.safetensors of each layer, and config.yaml.

z_l = x_l W_enc_l^T + b_enc_l; f = relu(z), or z where z > threshold; y_m = sum_{l <= m} f_l W_dec_l[:, m - l] + b_m.
Layers are numbered from 0, and have equally many latents. A skip connection is not read by circuit-tracer.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.formats.files import as_safetensors, read_safetensors, take, write_new
from sae_dist.formats.folded import fold
from sae_dist.formats.found import Found, Told, dictionary, either, need
from sae_dist.formats.names import Names
from sae_dist.sae.dictionary import Dictionary

KIND = "cross_layer_transcoder"  # model_kind in config.yaml
DIMS = {"W_enc": 2, "W_dec": 3, "b_enc": 1, "b_dec": 1, "threshold": 1}
LAYER = "L"  # stands for the number of a layer in a hook point's name


def export(own: Dictionary, to: Path, names: Names, *, config: str) -> list[Path]:
    """Two files a layer and `config` in `to`; UserError for what circuit-tracer does not know."""
    info, layers = own.info, len(own.info["sites"])
    reads, writes = (_kind(info[key], given) for key, given in (
        ("sites", names.hook if names.hook != info["hook"] else None),
        ("target_sites", names.target_hook if names.target_hook != info["target_hook"] else None),
    ))  # fmt: skip
    if len({site["width"] for key in ("sites", "target_sites") for site in info[key]}) > 1 or own.n_latents % layers:
        raise UserError(
            f"format=circuit_tracer has layers of one width and equally many latents, not {own.n_latents:,} of {layers}"
        )
    if own.threshold is None or own.signed or own.W_skip is not None:
        what = "a skip connection" if own.W_skip is not None else f"latents that are chosen as {info['variant']} does"
        raise UserError(
            f"format=circuit_tracer has cross-layer transcoders without {what}; train sae=batchtopk or sae=jumprelu, "
            "without train.skip"
        )
    whole, F, d = fold(own), own.n_latents // layers, info["sites"][0]["width"]
    about = {"model_name": names.model, "model_kind": KIND, "feature_input_hook": reads, "feature_output_hook": writes,
             "scan": to.name}  # fmt: skip
    written = []
    for layer in range(layers):
        latents, site = slice(layer * F, (layer + 1) * F), slice(layer * d, (layer + 1) * d)
        encoder = {"W_enc": whole.W_enc[site, latents].T, "b_enc": whole.b_enc[latents], "b_dec": whole.b_dec[site]}
        if not whole.is_relu and whole.threshold is not None:
            encoder["threshold"] = whole.threshold[latents]
        decoder = {"W_dec": whole.W_dec[latents, layer * d :].reshape(F, layers - layer, d)}
        for name, tensors in (("W_enc", encoder), ("W_dec", decoder)):
            data = as_safetensors({f"{key}_{layer}": tensor for key, tensor in tensors.items()})
            written.append(write_new(to / f"{name}_{layer}.safetensors", data))
    return [*written, write_new(to / config, yaml.safe_dump(about, sort_keys=False).encode())]


def _kind(sites: Sequence[dict[str, Any]], given: str | None) -> str:
    """What circuit-tracer calls these hook points, without their layers, which have to be 0, 1, 2, ..."""
    hooks = [site["hook"] for site in sites]
    kinds = {re.sub(rf"(?:^|(?<=\.)){number}(?=\.|$)", LAYER, hook) for number, hook in enumerate(hooks)}
    if len(kinds) > 1 or LAYER not in next(iter(kinds)).split("."):
        raise UserError(f"format=circuit_tracer wants one hook point of every layer from 0 on, not {'+'.join(hooks)}")
    kind = kinds.pop()
    return given or hook_names.LENS.get(kind.removesuffix(f".{LAYER}"), kind)


def read(folder: Path, config: dict[str, Any], told: Told) -> Dictionary:
    """All layers as one dictionary, whose matrices are as wide as all hook points side by side."""
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    if not layers:
        raise UserError(f"{folder} has no W_enc_0.safetensors, though its config.yaml says that it is a {KIND}")
    parts = [_layer(folder, layer) for layer in range(layers)]
    (F, d), d_out = parts[0]["W_enc"].shape, len(parts[0]["b_dec"])
    W_enc, W_dec = torch.zeros(layers * F, layers * d), torch.zeros(layers * F, layers * d_out)
    for layer, part in enumerate(parts):
        if part["W_enc"].shape != (F, d) or part["W_dec"].shape != (F, layers - layer, d_out):
            sizes = " and ".join(str(list(part[name].shape)) for name in ("W_enc", "W_dec"))
            raise UserError(f"{folder}: layer {layer} of {layers} has matrices of {sizes}, layer 0 of {F} x {d}")
        latents = slice(layer * F, (layer + 1) * F)
        W_enc[latents, layer * d : (layer + 1) * d] = part["W_enc"]
        W_dec[latents, layer * d_out :] = part["W_dec"].flatten(1)
    thresholds = [part["threshold"] for part in parts if "threshold" in part]
    if len(thresholds) not in (0, layers):
        raise UserError(f"{folder}: {len(thresholds)} of {layers} layers have thresholds; the rest are damaged")
    hooks = _hooks("hook", config.get("feature_input_hook"), told.hook, folder, layers)
    targets = _hooks("target_hook", config.get("feature_output_hook"), told.target_hook, folder, layers)
    found = Found(
        W_enc.T, W_dec, torch.cat([part["b_enc"] for part in parts]), torch.cat([part["b_dec"] for part in parts]),
        "jumprelu" if thresholds else "relu", pre_bias=False,
        threshold=torch.cat(thresholds) if thresholds else torch.zeros(layers * F), hook="+".join(hooks),
        target_hook="+".join(targets), model=config.get("model_name"),
    )  # fmt: skip
    rest = dataclasses.replace(told, hook=None, target_hook=None)
    own = dictionary(found, rest, path=folder, format="circuit_tracer")
    sites = {"sites": [{"hook": hook, "width": d} for hook in hooks],
             "target_sites": [{"hook": hook, "width": d_out} for hook in targets]}  # fmt: skip
    return dataclasses.replace(own, info={**own.info, **sites, "cross_layer": True})


def _layer(folder: Path, layer: int) -> dict[str, Tensor]:
    """Its tensors, by their names without the number."""
    encoder, decoder = (folder / f"{name}_{layer}.safetensors" for name in ("W_enc", "W_dec"))
    names, threshold = [f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec")], f"threshold_{layer}"
    found = take(read_safetensors(encoder), *names, path=encoder, optional=(threshold,))
    found |= take(read_safetensors(decoder), f"W_dec_{layer}", path=decoder)
    for name, tensor in found.items():
        if tensor.dim() != DIMS[name.removesuffix(f"_{layer}")]:
            raise UserError(f"{folder}: {name} has the shape {list(tensor.shape)}, which is not that of layer {layer}")
    return {name.removesuffix(f"_{layer}"): tensor for name, tensor in found.items()}


def _hooks(key: str, lens: object, told: str | None, folder: Path, layers: int) -> list[str]:
    """The hook points of all layers, from the file's name of them or from the one that was told, with L for a layer."""
    known = hook_names.from_lens(f"blocks.0.{lens}")
    own = None if known is None else f"{known.removesuffix('0')}{LAYER}"
    kind = need(either(key, own, told, folder), key, "its hook points in a name that is known here", folder)
    if LAYER not in kind.split("."):
        raise UserError(f"{key}={kind} is of one layer, and {folder} has {layers}; write L for its number: resid_pre.L")
    return [".".join(str(layer) if part == LAYER else part for part in kind.split(".")) for layer in range(layers)]
