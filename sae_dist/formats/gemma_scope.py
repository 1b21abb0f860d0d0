"""Gemma Scope (2024): params.npz of one dictionary. z = x W_enc + b_enc; f = relu(z) where z > threshold; no pre-bias.

The file names neither model nor hook point. A dictionary of embeddings reads x / sqrt(d) and its output is multiplied
by sqrt(d); only its path says that it is one.
"""

import re
from pathlib import Path

from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.formats.files import inside, read_npz, take
from sae_dist.formats.found import Found, Told

TOLD = ("model", "hook", "target_hook", "k")
WEIGHTS = "params.npz"


def read(path: Path, told: Told) -> Found:
    file = inside(path, WEIGHTS)
    stored = {name.lower(): tensor for name, tensor in read_npz(file).items()}
    factor = stored.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise UserError(f"{file} has a scaling_factor that is not 1, whose use is not published")
    own = take(stored, "w_enc", "w_dec", "b_enc", "b_dec", "threshold", path=file)
    place = file.resolve().as_posix()
    layer, l0 = re.findall(r"/layer_(\d+)/", place), re.findall(r"/average_l0_(\d+)/", place)
    if layer and told.hook is not None and hook_names.layer(told.hook) not in (None, int(layer[-1])):
        raise UserError(f"hook={told.hook} was told, but the path says layer {layer[-1]}: {file}")
    root = len(own["w_enc"]) ** 0.5 if "/embedding/" in place else 1.0
    return Found(
        own["w_enc"] / root, own["w_dec"] * root, own["b_enc"], own["b_dec"], "jumprelu", pre_bias=False,
        k=int(l0[-1]) if l0 and told.k is None else None, threshold=own["threshold"],
    )  # fmt: skip
