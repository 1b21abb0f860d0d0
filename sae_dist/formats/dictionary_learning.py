"""dictionary_learning (0.1.0), and SAEBench's files: a folder with ae.pt, a dict of tensors, and config.json.

AutoEncoder, AutoEncoderTopK, BatchTopKSAE and MatryoshkaBatchTopKSAE encode x minus the decoder's bias;
JumpReluAutoEncoder and AutoEncoderNew encode x. BatchTopK ones keep relu(z) above one threshold at inference.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.formats.files import as_json, as_torch, inside, read_object, read_torch, take, write_new
from sae_dist.formats.folded import folded, refuse_transcoder
from sae_dist.formats.found import Found, Told
from sae_dist.formats.hook_names import layer
from sae_dist.formats.names import Names
from sae_dist.sae.dictionary import Dictionary

TOLD = ("model", "hook", "k")
NAMED = ("model_name",)
WEIGHTS, CONFIG = "ae.pt", "config.json"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
OWN = ("W_enc", "b_enc", "W_dec", "b_dec")
GATED = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
CLASSES = {  # dict_class: (tensors, those that may be there, whether x minus the decoder's bias is encoded)
    "AutoEncoder": ((*LINEAR, "bias"), (), True),
    "AutoEncoderNew": ((*LINEAR, "decoder.bias"), (), False),
    "AutoEncoderTopK": ((*LINEAR, "b_dec"), ("k", "threshold"), True),
    "BatchTopKSAE": ((*LINEAR, "b_dec", "threshold"), ("k",), True),
    "MatryoshkaBatchTopKSAE": ((*OWN, "threshold"), ("k", "group_sizes"), True),
    "JumpReluAutoEncoder": ((*OWN, "threshold"), (), False),
    "GatedAutoEncoder": (GATED, (), True),
}  # fmt: skip
VARIANTS = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka",
            "JumpReluAutoEncoder": "jumprelu", "GatedAutoEncoder": "gated"}  # fmt: skip


def export(dictionary: Dictionary, to: Path, names: Names) -> list[Path]:
    """ae.pt and config.json in `to`: AutoEncoderTopK, AutoEncoder for thresholds of 0, else JumpReluAutoEncoder."""
    refuse_transcoder(dictionary, to="dictionary_learning")
    if dictionary.signed:
        raise UserError("format=dictionary_learning has no latents of both signs; use saelens")
    own, tensors = folded(dictionary, to="dictionary_learning"), dict[str, Tensor]()
    linear = {"encoder.weight": own.W_enc.T, "encoder.bias": own.b_enc_centred, "decoder.weight": own.W_dec.T}
    more: dict[str, Any] = {}
    if own.threshold is None:
        k = torch.tensor(dictionary.k, dtype=torch.int32)
        tensors = linear | {"b_dec": own.b_dec, "k": k, "threshold": torch.tensor(-1.0)}  # which it does not read
        kind, more = "AutoEncoderTopK", {"k": dictionary.k}
    elif own.is_relu:
        tensors, kind = linear | {"bias": own.b_dec}, "AutoEncoder"
    else:
        tensors = {name: getattr(own, name) for name in OWN} | {"threshold": own.threshold}
        kind = "JumpReluAutoEncoder"
    trainer = {
        "dict_class": kind, "activation_dim": len(own.W_enc), "dict_size": len(own.b_enc), "lm_name": names.model,
        "layer": layer(dictionary.info["hook"]), "submodule_name": dictionary.info["hook"], **more,
    }  # fmt: skip
    weights = write_new(to / WEIGHTS, as_torch(tensors))
    return [weights, write_new(to / CONFIG, as_json({"trainer": trainer, "buffer": {"io": "out"}}))]


def read(path: Path, told: Told) -> Found:  # noqa: ARG001
    weights = inside(path, WEIGHTS)
    trainer = read_object(weights.with_name(CONFIG)).get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if kind not in CLASSES:
        raise UserError(
            f"{weights.with_name(CONFIG)}: dict_class={kind} cannot be read; those that can: {', '.join(CLASSES)}"
        )
    assert isinstance(trainer, dict)
    tensors = read_torch(weights)
    if "ae" in tensors and "step" in tensors:
        raise UserError(f"{weights} is the checkpoint of a training that has not ended; its biases have another scale")
    wanted, optional, pre_bias = CLASSES[kind]
    own = take(
        {key: torch.as_tensor(value) for key, value in tensors.items()}, *wanted, path=weights, optional=optional
    )
    W_enc = own["encoder.weight"].T if "encoder.weight" in own else own["W_enc"]
    W_dec = own["decoder.weight"].T if "decoder.weight" in own else own["W_dec"]
    b_dec = next(own[name] for name in ("bias", "decoder.bias", "b_dec", "decoder_bias") if name in own)
    b_enc = own.get("encoder.bias", own.get("b_enc", own.get("mag_bias")))
    assert b_enc is not None
    k = int(own["k"]) if "k" in own else trainer.get("k")
    found = Found(
        W_enc, W_dec, b_enc, b_dec, VARIANTS.get(kind, "relu"), pre_bias, k=k,
        threshold=_threshold(kind, own, weights), hook=_hook(trainer), model=trainer.get("lm_name"),
    )  # fmt: skip
    if kind == "GatedAutoEncoder":  # tied encoders: one comparison with the magnitude says whether the gate is open
        gain = own["r_mag"].exp()
        return found._replace(W_enc=W_enc * gain, threshold=b_enc - gain * own["gate_bias"])
    return found


def _threshold(kind: str, own: dict[str, Tensor], path: Path) -> Tensor | None:
    if kind == "AutoEncoderTopK":
        return None
    if "threshold" not in own:
        return torch.zeros(len(own.get("encoder.bias", own["decoder.weight"].T)))
    if own["threshold"].ndim == 0 and own["threshold"] < 0:
        raise UserError(
            f"{path}: threshold={float(own['threshold']):g} was never set: training ended before that; "
            "the file does not say which latents are active"
        )
    return own["threshold"].expand(own["W_enc"].shape[1] if "W_enc" in own else len(own["encoder.bias"])).clone()


def _hook(trainer: dict[str, Any]) -> str | None:
    match = re.fullmatch(r"resid_post(?:_layer_|\.)(\d+)", str(trainer.get("submodule_name")))
    return f"resid_post.{match[1]}" if match else None
