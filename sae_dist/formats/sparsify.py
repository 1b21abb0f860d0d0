"""sparsify (1.3.3): a folder, named for the hook point, with cfg.json and sae.safetensors.

z = (x - b_dec, or x of a transcoder) encoder.weight^T + encoder.bias; the k largest of relu(z) times W_dec, + b_dec.
"""

from pathlib import Path

from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.formats.files import as_json, as_safetensors, inside, read_object, read_safetensors, take, write_new
from sae_dist.formats.folded import folded, needs_top_k
from sae_dist.formats.found import Found, Told, need
from sae_dist.formats.names import Names
from sae_dist.sae.dictionary import Dictionary

TOLD = ("model", "hook", "target_hook", "k")
NAMED = ()
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def export(dictionary: Dictionary, to: Path, names: Names) -> list[Path]:  # noqa: ARG001
    """cfg.json and sae.safetensors in `to`, which sparsify expects to be named for the module: layers.10."""
    k, own, transcodes = needs_top_k(dictionary, to="sparsify"), folded(dictionary, to="sparsify"), False
    if dictionary.b_in is not None:
        transcodes = True
        if len(own.W_enc) != len(own.b_dec):
            widths = f"{len(own.W_enc)} -> {len(own.b_dec)}"
            raise UserError(f"format=sparsify has transcoders of one width; this one has {widths}")
    tensors = {
        "encoder.weight": own.W_enc.T, "encoder.bias": own.b_enc if transcodes else own.b_enc_centred,
        "W_dec": own.W_dec, "b_dec": own.b_dec,
    }  # fmt: skip
    if own.W_skip is not None:
        tensors["W_skip"] = own.W_skip.T
    cfg = {
        "activation": "topk", "expansion_factor": -(-len(own.b_enc) // len(own.W_enc)), "num_latents": len(own.b_enc),
        "k": k, "d_in": len(own.W_enc), "normalize_decoder": True, "multi_topk": False, "transcode": transcodes,
        "skip_connection": own.W_skip is not None,
    }  # fmt: skip
    weights = write_new(to / WEIGHTS, as_safetensors(tensors))
    return [weights, write_new(to / CONFIG, as_json(cfg))]


def read(path: Path, told: Told) -> Found:
    cfg_path = inside(path, CONFIG)
    cfg, weights = read_object(cfg_path), cfg_path.with_name(WEIGHTS)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise UserError(f"{cfg_path}: activation={activation} cannot be read, only topk")
    if cfg.get("signed"):
        raise UserError(f"{cfg_path}: signed=true cannot be read")
    names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if cfg.get("skip_connection") else [])]
    own = take(read_safetensors(weights), *names, path=weights)
    n, d_in = cfg.get("num_latents") or cfg["d_in"] * cfg["expansion_factor"], cfg["d_in"]
    if tuple(own["encoder.weight"].shape) != (n, d_in):
        raise UserError(
            f"{weights}: encoder.weight is {list(own['encoder.weight'].shape)} where cfg.json says {[n, d_in]}"
        )
    transcodes = bool(cfg.get("transcode"))
    if transcodes:
        need(told.hook, "hook", "what it reads: the module's input", cfg_path)
        need(told.target_hook, "target_hook", "what it rebuilds: the module's output", cfg_path)
    return Found(
        own["encoder.weight"].T, own["W_dec"], own["encoder.bias"], own["b_dec"], "topk", pre_bias=not transcodes,
        k=cfg.get("k"), hook=None if transcodes else hook_names.from_block(cfg_path.parent.name),
        W_skip=own["W_skip"].T if "W_skip" in own else None,
    )  # fmt: skip
