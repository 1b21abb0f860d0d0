"""Gemma Scope 2 (2025): config.json and params.safetensors. z = x w_enc + b_enc; f = relu(z) where z > threshold.

Hook points are module paths with .input or .output. config.json may be missing; then model and hook points are told.
"""

from pathlib import Path

from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.formats.files import inside, read_object, read_safetensors, take
from sae_dist.formats.found import Found, Told, need

TOLD = ("model", "hook", "target_hook", "k")
CONFIG, WEIGHTS = "config.json", "params.safetensors"


def read(path: Path, told: Told) -> Found:
    file = inside(path, WEIGHTS)
    config = read_object(file.with_name(CONFIG)) if file.with_name(CONFIG).is_file() else {}
    if config and (architecture := config.get("architecture")) != "jump_relu":
        raise UserError(f"{file.with_name(CONFIG)}: architecture={architecture} cannot be read, only jump_relu")
    stored = read_safetensors(file)
    skip = ("affine_skip_connection",) if config.get("affine_connection") or "affine_skip_connection" in stored else ()
    own = take(stored, "w_enc", "w_dec", "b_enc", "b_dec", "threshold", *skip, path=file)
    if own["w_dec"].ndim == 3:
        raise UserError(f"{file} is a layer of a cross-layer transcoder, which dictionaries here are not")
    reads, writes = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    target = None if writes in (None, reads) else hook_names.from_module(writes)
    if target is None and writes not in (None, reads):
        need(told.target_hook, "target_hook", f"{writes} in a name that is known here", file)
    return Found(
        own["w_enc"], own["w_dec"], own["b_enc"], own["b_dec"], "jumprelu", pre_bias=False, threshold=own["threshold"],
        hook=hook_names.from_module(reads), target_hook=target, model=config.get("model_name"),
        W_skip=own.get("affine_skip_connection"),
    )  # fmt: skip
