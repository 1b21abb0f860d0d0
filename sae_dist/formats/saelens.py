"""SAELens (6.54): a folder with cfg.json and sae_weights.safetensors.

z = (x - b_dec if apply_b_dec_to_input) W_enc + b_enc; jumprelu keeps relu(z) where z > threshold, topk the k largest of
relu(z), standard all of relu(z), gated relu(exp(r_mag) u + b_mag) where u + b_gate > 0, with u = z - b_enc.
"""

from pathlib import Path
from typing import Any

import torch

from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.formats.files import as_json, as_safetensors, inside, read_object, read_safetensors, take, write_new
from sae_dist.formats.folded import folded
from sae_dist.formats.found import Found, Told, either, need
from sae_dist.formats.names import Names
from sae_dist.sae.dictionary import Dictionary

TOLD = ("model", "hook", "target_hook", "k", "pre_bias", "scale")
NAMED = ("model_name", "hook_name", "hook_name_out")
CONFIG, WEIGHTS, VERSION = (
    "cfg.json",
    "sae_weights.safetensors",
    "6.54.12",
)  # the version whose layout this is
PLAIN = ("W_enc", "W_dec", "b_enc", "b_dec")
GATED = ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec")
KINDS = {  # architecture: (our kind, tensors)
    "standard": ("relu", PLAIN),
    "topk": ("topk", PLAIN),
    "abstopk": ("abs_topk", PLAIN),
    "jumprelu": ("jumprelu", (*PLAIN, "threshold")),
    "gated": ("gated", GATED),
    "transcoder": ("relu", PLAIN),
    "jumprelu_transcoder": ("jumprelu", (*PLAIN, "threshold")),
    "skip_transcoder": ("relu", (*PLAIN, "W_skip")),
    "jumprelu_skip_transcoder": ("jumprelu", (*PLAIN, "threshold", "W_skip")),
}
PER_ROW = ("layer_norm", "constant_norm_rescale", "covariance_whitening")


def export(dictionary: Dictionary, to: Path, names: Names) -> list[Path]:
    """cfg.json and sae_weights.safetensors in `to`."""
    own = folded(dictionary, to="saelens")
    tensors = {name: getattr(own, name) for name in PLAIN}
    architecture = _architecture(dictionary, relu=own.is_relu)
    if "jumprelu" in architecture:
        assert own.threshold is not None
        tensors["threshold"] = own.threshold
    if own.W_skip is not None:
        tensors["W_skip"] = own.W_skip.T
    cfg: dict[str, Any] = {
        "architecture": architecture, "d_in": len(own.W_enc), "d_sae": len(own.b_enc), "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION, "sae_lens_training_version": None, "model_name": names.model,
            "hook_name": names.hook, "hf_hook_name": names.module_path, "hook_head_index": None,
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
        },
    }  # fmt: skip
    if architecture.endswith("topk"):
        cfg |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    if dictionary.b_in is not None:
        cfg["d_out"] = len(own.b_dec)
        cfg["metadata"] |= {"hook_name_out": names.target_hook}
    weights = write_new(to / WEIGHTS, as_safetensors(tensors))
    return [weights, write_new(to / CONFIG, as_json(cfg))]


def _architecture(dictionary: Dictionary, *, relu: bool) -> str:
    transcodes = dictionary.b_in is not None
    if dictionary.threshold is None:
        if transcodes:
            raise UserError(
                "format=saelens has transcoders with thresholds only; this one keeps the k largest latents of a row: "
                "use sparsify or circuit_tracer"
            )
        return "abstopk" if dictionary.signed else "topk"
    if not transcodes:
        return "standard" if relu else "jumprelu"
    return ("" if relu else "jumprelu_") + ("transcoder" if dictionary.W_skip is None else "skip_transcoder")


def read(path: Path, told: Told) -> Found:
    cfg_path = inside(path, CONFIG)
    cfg = read_object(cfg_path)
    metadata = cfg.get("metadata") or cfg  # flat before version 6
    architecture = cfg.get("architecture")
    if architecture is None and cfg.get("activation_fn_str", cfg.get("activation_fn")) is None:
        raise UserError(f"{cfg_path} does not say its architecture; a file that old has to be saved again by SAELens 6")
    architecture = str(architecture or "standard")
    k = cfg.get("k")
    if architecture == "standard" and cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk":  # before 6
        architecture, k = "topk", (cfg.get("activation_fn_kwargs") or {}).get("k")
    if architecture not in KINDS:
        raise UserError(f"{cfg_path}: architecture={architecture} cannot be read; those that can: {', '.join(KINDS)}")
    variant, wanted = KINDS[architecture]
    tensors = take(read_safetensors(cfg_path.with_name(WEIGHTS)), *wanted, path=cfg_path.with_name(WEIGHTS))
    transcodes = architecture.endswith("transcoder")
    found = Found(
        tensors["W_enc"], tensors["W_dec"], tensors.get("b_enc", tensors["W_enc"].new_zeros(0)), tensors["b_dec"],
        variant, pre_bias=False if transcodes else _pre_bias(cfg, told, cfg_path), k=k,
        threshold=tensors.get("threshold"), scale=_scale(cfg, told, cfg_path), scale_out=1.0 if transcodes else None,
        hook=hook_names.from_lens(metadata.get("hook_name", metadata.get("hook_point")))
        or hook_names.from_module(metadata.get("hf_hook_name")),
        target_hook=hook_names.from_lens(metadata.get("hook_name_out")) if transcodes else None,
        model=metadata.get("model_name"), W_skip=tensors["W_skip"].T if "W_skip" in tensors else None,
    )  # fmt: skip
    if transcodes and found.target_hook is None:
        need(told.target_hook, "target_hook", "which hook point it rebuilds in a name that is known here", cfg_path)
    if architecture == "gated":
        gain, b_mag = tensors["r_mag"].exp(), tensors["b_mag"]
        return found._replace(W_enc=found.W_enc * gain, b_enc=b_mag, threshold=b_mag - gain * tensors["b_gate"])
    if variant == "relu":
        return found._replace(threshold=torch.zeros_like(found.b_enc))
    if cfg.get("rescale_acts_by_decoder_norm"):  # latents are ranked as if decoder rows had norm 1
        norm = found.W_dec.norm(dim=1)
        return found._replace(
            W_enc=found.W_enc * norm, b_enc=found.b_enc * norm, W_dec=found.W_dec / norm.where(norm > 0, 1)[:, None]
        )
    return found


def _pre_bias(cfg: dict[str, Any], told: Told, path: Path) -> bool:
    own = either("pre_bias", cfg.get("apply_b_dec_to_input"), told.pre_bias, path)
    return bool(need(own, "pre_bias", "whether its encoder reads x - b_dec", path))


def _scale(cfg: dict[str, Any], told: Told, path: Path) -> float:
    mode = cfg.get("normalize_activations", "none")
    if mode in PER_ROW:
        raise UserError(f"{path}: normalize_activations={mode} changes every row by itself, which cannot be folded in")
    if mode in ("none", None, False):
        return either("scale", 1.0, told.scale, path)
    what = f"by what normalize_activations={mode} multiplies x; it is sqrt(d_in) over the mean norm of rows"
    return float(need(told.scale, "scale", what, path))
