"""delphi (0.1): HOOK/FIRST_LAST.safetensors, place and value of each activation of these latents, and config.json.

Of the held-out rows of a run, with their text as sequences of tokens. What a harvest drops has no activation: the first
position of a sequence, separators, rows that are not finite.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float16, Int64
from sae_kernels import Active

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.formats.files import as_json, as_safetensors, write_new
from sae_dist.public_names import model_name, text_name
from sae_dist.sae.dictionary import Dictionary
from sae_dist.shards import stores
from sae_dist.shards.hooks import said_by
from sae_dist.shards.reader import Store, heldout
from sae_dist.text.stream import TokenStream

SPLITS = 5  # files, as delphi's own default
LEAST = 1e-5  # values that are not larger are left out there
BATCH_ROWS = 4096


class Places(NamedTuple):
    """Activations of all rows, in their order: 14 bytes each."""

    at: Int64[np.ndarray, " n"]  # sequence * context + position
    latent: np.ndarray  # int32
    value: Float16[np.ndarray, " n"]


def write(run: Path, own: Dictionary, to: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """`config` is config.yaml of the run. Files that are complete are kept."""
    hook, *others = said_by(own.info).reads
    if others:
        raise UserError(f"format=delphi has dictionaries of one hook point, not of {'+'.join([hook, *others])}")
    store = stores.open(storage.open(str(config.get("store") or run / "store")))
    stream = _heldout_text(run)
    found = _activations(store, stream, own, hook)
    folder = to / _module(hook)
    tokens = torch.from_numpy(np.asarray(stream.tokens, np.int64).reshape(-1, stream.context))
    bounds = np.linspace(0, own.n_latents, SPLITS + 1).astype(int).tolist()
    for first, end in zip(bounds, bounds[1:], strict=False):
        if first < end:
            data = as_safetensors({**_split(found, first, end, stream.context), "tokens": tokens})
            yield write_new(folder / f"{first}_{end - 1}.safetensors", data)
    about = {
        "dataset_repo": text_name(dict(config.get("text") or {})), "dataset_split": "held out", "dataset_name": "",
        "dataset_column": "text", "batch_size": 1, "cache_ctx_len": stream.context, "n_tokens": tokens.numel(),
        "n_splits": SPLITS, "model_name": model_name(own.info.get("model")),
    }  # fmt: skip
    yield write_new(folder / "config.json", as_json(about))


def _heldout_text(run: Path) -> TokenStream:
    found = sorted(run.glob("text/*/heldout/stream.json"))
    if len(found) != 1:
        raise UserError(
            f"{run / 'text'} has {len(found)} held-out texts, but the activations are of one; give the run that "
            "tokenised its text"
        )
    return TokenStream(found[0].parent)


def _module(hook: str) -> str:
    """A layer's output by the path that delphi gives it, of all else the hook point's own name."""
    kind, _, layer = hook.rpartition(".")
    return f"layers.{layer}" if kind == "resid_post" else hook


@torch.no_grad()
def _activations(store: Store, stream: TokenStream, own: Dictionary, hook: str) -> Places:
    parts = [
        _kept(own.encode(rows.x.float()), stream.places(rows.doc, rows.pos))
        for rows in heldout(store, hook, BATCH_ROWS)
    ]
    if not parts:
        raise UserError(f"{store.storage.uri} has no held-out rows; harvest with harvest.heldout_tokens")
    return Places(*map(np.concatenate, zip(*parts, strict=True)))


def _kept(active: Active, at: Int64[np.ndarray, " rows"]) -> Places:
    kept = active.values.abs() > LEAST
    row, latent, value = (each[kept].numpy() for each in (active.rows, active.indices, active.values.half()))
    return Places(at[row], latent.astype(np.int32), value)


def _split(found: Places, first: int, end: int, context: int) -> dict[str, torch.Tensor]:
    """Latents from `first` to before `end`: [n, 3] of sequence, position and latent - first, and their values."""
    own = (found.latent >= first) & (found.latent < end)
    at, latent = found.at[own], found.latent[own] - first
    order = np.argsort(at, kind="stable")  # as delphi collects them: by place in the text
    locations = np.stack([at // context, at % context, latent], 1)[order]
    small = not len(locations) or locations.max() < 1 << 16
    kind = torch.uint16 if small else torch.uint32
    return {
        "locations": torch.from_numpy(locations).to(kind),
        "activations": torch.from_numpy(found.value[own][order]),
    }
