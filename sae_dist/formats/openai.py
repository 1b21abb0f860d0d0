"""OpenAI (2024): one .pt: pre_bias, encoder.weight [n_latents, d], latent_bias, decoder.weight [d, n_latents].

z = (x - pre_bias) encoder.weight^T + latent_bias; relu(z), or the k largest of it; times decoder.weight^T, + pre_bias.
The published TopK ones read rows of mean 0 and deviation 1, which no file says.
"""

from pathlib import Path
from typing import Any

import torch

from sae_dist.config import UserError
from sae_dist.formats.files import as_torch, read_torch, take, write_new
from sae_dist.formats.folded import folded, refuse_transcoder
from sae_dist.formats.found import Found, Told, need
from sae_dist.formats.names import Names
from sae_dist.sae.dictionary import Dictionary

TOLD = ("model", "hook", "k", "scale")
NAMED = ()
PLAIN = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")
COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def export(dictionary: Dictionary, to: Path, names: Names) -> list[Path]:  # noqa: ARG001
    """autoencoder.pt in `to`."""
    refuse_transcoder(dictionary, to="openai")
    own = folded(dictionary, to="openai")
    if dictionary.signed or not (own.threshold is None or own.is_relu):
        raise UserError("format=openai has TopK and ReLU only; use saelens or dictionary_learning")
    values: dict[str, Any] = {
        "pre_bias": own.b_dec, "encoder.weight": own.W_enc.T, "latent_bias": own.b_enc_centred,
        "decoder.weight": own.W_dec.T, "stats_last_nonzero": torch.zeros(len(own.b_enc), dtype=torch.int64),
        "activation": "TopK" if own.threshold is None else "ReLU",
    }  # fmt: skip
    if own.threshold is None:
        values["activation_state_dict"] = {"k": dictionary.k}
    return [write_new(to / "autoencoder.pt", as_torch(values))]


def read(path: Path, told: Told) -> Found:
    if not path.is_file():
        raise UserError(f"path={path} is no file; give the .pt of one autoencoder")
    stored = read_torch(path)
    activation, state = stored.pop("activation", None), stored.pop("activation_state_dict", None) or {}
    own = take(stored, *PLAIN, path=path, optional=COUNTERS)
    if activation not in ("TopK", "ReLU"):
        raise UserError(f"{path}: activation={activation} cannot be read, only TopK and ReLU")
    what = (
        "whether it reads raw rows, or rows of mean 0 and deviation 1, which cannot be folded in (then it is of no use)"
    )
    scale = need(told.scale, "scale", what, path) if activation == "TopK" else told.scale or 1.0
    return Found(
        own["encoder.weight"].T, own["decoder.weight"].T, own["latent_bias"], own["pre_bias"],
        "topk" if activation == "TopK" else "relu", pre_bias=True, k=state.get("k"), scale=scale,
        threshold=None if activation == "TopK" else torch.zeros_like(own["latent_bias"]),
    )  # fmt: skip
