"""circuit-tracer (0.5): a folder of per-layer transcoders, layer_L.safetensors each, and config.yaml.

Cross-layer transcoders have other files (circuit_tracer_clt.py).

z = x W_enc^T + b_enc; relu(z), z where z > activation_function.threshold, or the k largest (activation: topk with k in
config.yaml); times W_dec, + b_dec. Export adds a layer to the folder; circuit-tracer wants all from 0 on.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from sae_dist.config import UserError
from sae_dist.formats import circuit_tracer_clt, hook_names
from sae_dist.formats.files import as_safetensors, inside, read_safetensors, take, write_new
from sae_dist.formats.folded import folded
from sae_dist.formats.found import Found, Told, need
from sae_dist.formats.names import Names
from sae_dist.sae.dictionary import Dictionary

TOLD = ("model", "hook", "target_hook", "k")
NAMED = ("model_name", "hook_name", "hook_name_out")
CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"
KINDS = ("transcoder_set", circuit_tracer_clt.KIND)
PLAIN = ("W_enc", "W_dec", "b_enc", "b_dec")


def export(dictionary: Dictionary, to: Path, names: Names) -> list[Path]:
    """layer_L.safetensors in `to`, and config.yaml, which must be that of the layers that are there already."""
    if dictionary.info.get("cross_layer"):
        return circuit_tracer_clt.export(dictionary, to, names, config=CONFIG)
    if dictionary.b_in is None or names.target_hook is None:
        raise UserError(
            "format=circuit_tracer has transcoders only; this dictionary rebuilds what it reads: use saelens"
        )
    own, L = folded(dictionary, to="circuit_tracer"), hook_names.layer(dictionary.info["target_hook"])
    if L is None or hook_names.layer(dictionary.info["hook"]) != L:
        both = f"{dictionary.info['hook']} -> {dictionary.info['target_hook']}"
        raise UserError(f"format=circuit_tracer wants both hook points in one layer, not {both}")
    if dictionary.signed or len(own.W_enc) != len(own.b_dec):
        raise UserError("format=circuit_tracer has transcoders of one width, without latents of both signs")
    tensors = {"W_enc": own.W_enc.T, "W_dec": own.W_dec, "b_enc": own.b_enc, "b_dec": own.b_dec}
    config: dict[str, Any] = {
        "model_name": names.model, "model_kind": KINDS[0], "feature_input_hook": _in_block(names.hook),
        "feature_output_hook": _in_block(names.target_hook), "scan": to.name,
    }  # fmt: skip
    if own.threshold is None:
        config |= {"activation": "topk", "k": dictionary.k}
    elif not own.is_relu:
        tensors[THRESHOLD] = own.threshold
    if own.W_skip is not None:
        tensors["W_skip"] = own.W_skip.T
    about = write_new(to / CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
    return [write_new(to / f"layer_{L}.safetensors", as_safetensors(tensors)), about]


def _in_block(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def read(path: Path, told: Told) -> Found | Dictionary:
    folder = path.parent if path.is_file() else path
    config = _config(inside(folder, CONFIG))
    if config["model_kind"] == circuit_tracer_clt.KIND:
        return circuit_tracer_clt.read(folder, config, told)
    if not path.is_file():
        layers = sorted(path.glob("layer_*.safetensors"))
        if len(layers) != 1:
            raise UserError(f"path={path} has {len(layers)} files layer_L.safetensors; give the one to import")
        path = layers[0]
    match = re.fullmatch(r"layer_(\d+)\.safetensors", path.name)
    own = take(read_safetensors(path), *PLAIN, path=path, optional=(THRESHOLD, "W_skip"))
    k = config.get("k") if config.get("activation") == "topk" else None
    if own["W_enc"].shape == (len(own["b_dec"]), len(own["b_enc"])) and len(own["b_dec"]) != len(own["b_enc"]):
        raise UserError(f"{path}: W_enc is {list(own['W_enc'].shape)} where latents must come first; it is transposed")
    threshold = own.get(THRESHOLD)
    variant = "jumprelu" if threshold is not None else "topk" if k else "relu"
    hook, target = (
        hook_names.from_lens(f"blocks.{match[1]}.{config.get(key)}") if match else None
        for key in ("feature_input_hook", "feature_output_hook")
    )
    if target is None:
        need(told.target_hook, "target_hook", "which hook point it rebuilds in a name that is known here", path)
    return Found(
        own["W_enc"].T, own["W_dec"], own["b_enc"], own["b_dec"], variant, pre_bias=False, k=k,
        threshold=torch.zeros_like(own["b_enc"]) if variant == "relu" else threshold, hook=hook, target_hook=target,
        model=config.get("model_name"), W_skip=own["W_skip"].T if "W_skip" in own else None,
    )  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or found.get("model_kind") not in KINDS:
        raise UserError(f"{path} is not of a {' or a '.join(KINDS)}; sets of other kinds cannot be read")
    return found
