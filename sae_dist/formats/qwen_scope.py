"""Qwen-Scope (2026): layerN.sae.pt, a dict of W_enc [n_latents, d], W_dec [d, n_latents], b_enc, b_dec.

The k largest of z = x W_enc^T + b_enc, without a relu: of so many latents k are positive. File N reads the output of
block N. k stands in the name of the repository (..-L0_K), the model nowhere.
"""

import re
from pathlib import Path

from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.formats.files import as_torch, read_torch, take, write_new
from sae_dist.formats.folded import folded, needs_top_k, refuse_transcoder
from sae_dist.formats.found import Found, Told
from sae_dist.formats.names import Names
from sae_dist.sae.dictionary import Dictionary

TOLD = ("model", "hook", "k")
NAMED = ()


def export(dictionary: Dictionary, to: Path, names: Names) -> list[Path]:  # noqa: ARG001
    """layerN.sae.pt in `to`."""
    refuse_transcoder(dictionary, to="qwen_scope")
    needs_top_k(dictionary, to="qwen_scope")
    own, hook = folded(dictionary, to="qwen_scope"), dictionary.info["hook"]
    if not hook.startswith("resid_post."):
        raise UserError(f"format=qwen_scope has dictionaries of resid_post only, not of {hook}")
    tensors = {"W_enc": own.W_enc.T, "W_dec": own.W_dec.T, "b_enc": own.b_enc, "b_dec": own.b_dec}
    return [write_new(to / f"layer{hook_names.layer(hook)}.sae.pt", as_torch(tensors))]


def read(path: Path, told: Told) -> Found:
    if not path.is_file():
        raise UserError(f"path={path} is no file; give one layerN.sae.pt")
    own = take(read_torch(path), "W_enc", "W_dec", "b_enc", "b_dec", path=path)
    layer = re.fullmatch(r"layer(\d+)\.sae\.pt", path.name)
    k = re.search(r"L0_(\d+)", path.resolve().parent.name)
    return Found(
        own["W_enc"].T, own["W_dec"].T, own["b_enc"], own["b_dec"], "topk", pre_bias=False,
        k=int(k[1]) if k and told.k is None else None, hook=f"resid_post.{layer[1]}" if layer else None,
    )  # fmt: skip
