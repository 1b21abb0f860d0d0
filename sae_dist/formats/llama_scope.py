"""Llama Scope (2024): hyperparams.json and checkpoints/final.safetensors.

With s = sqrt(d) / the mean norm of rows: z = s x encoder.weight^T + encoder.bias; a latent is active where z, times the
norm of its decoder column if sparsity_include_decoder_norm, is above one threshold; s y = f decoder.weight^T +
decoder.bias. Tools disagree on whether the threshold is meant for raw or for scaled rows, so it has to be told:
about 50 latents of a row are active where it is right.
"""

from pathlib import Path

from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.formats.files import inside, read_object, read_safetensors, take
from sae_dist.formats.found import Found, Told, need

TOLD = ("model", "hook", "target_hook", "k", "threshold_units")
CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"


def read(path: Path, told: Told) -> Found:
    config_path = inside(path, CONFIG)
    config, file = read_object(config_path), config_path.parent / WEIGHTS
    for key, known in {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "use_glu_encoder": False}.items():
        if config.get(key, known) != known:
            raise UserError(f"{config_path}: {key}={config[key]} cannot be read, only {known}")
    own = take(read_safetensors(file), "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", path=file)
    norms, threshold = config.get("dataset_average_activation_norm"), config.get("jump_relu_threshold")
    if not isinstance(norms, dict) or "in" not in norms or not isinstance(threshold, int | float):
        raise UserError(f"{config_path} lacks dataset_average_activation_norm or jump_relu_threshold")
    W_enc, W_dec, b_enc = own["encoder.weight"].T, own["decoder.weight"].T, own["encoder.bias"]
    scale = len(W_enc) ** 0.5 / norms["in"]
    scale_out = len(own["decoder.bias"]) ** 0.5 / norms.get("out", norms["in"])
    units = need(
        told.threshold_units, "threshold_units", "whether its threshold is for raw or for scaled rows (raw in the tool "
        "that trained it, scaled in SAELens 6; verify=STORE shows which: L0 is about 50)", config_path,
    )  # fmt: skip
    if config.get("sparsity_include_decoder_norm"):  # latents are compared as if decoder columns had norm 1
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm.where(norm > 0, 1)[:, None]
    of_scaled = float(threshold) * (scale_out if units == "raw" else 1.0)
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    return Found(
        W_enc, W_dec, b_enc, own["decoder.bias"], "jumprelu",
        pre_bias=bool(config.get("apply_decoder_bias_to_pre_encoder")), scale=scale, scale_out=scale_out,
        threshold=b_enc.new_full(b_enc.shape, of_scaled), hook=hook_names.from_lens(reads),
        target_hook=hook_names.from_lens(writes) if writes not in (None, reads) else None,
    )  # fmt: skip
