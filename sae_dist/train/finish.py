"""The finished dictionary, written from the shards of the last checkpoint: nobody ever holds it whole."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_dist.sae import dictionary
from sae_dist.sae.initialize import Parameters
from sae_dist.sae.scale import folded
from sae_dist.storage import Storage, StorageError
from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import DAMAGE, Manifest

logger = logging.getLogger(__name__)

EXPORTED = (*Parameters._fields, "threshold")


def write_dictionary(storage: Storage, out: Path, *, step: int, k: int, info: Mapping[str, Any]) -> None:
    """`out`/dictionary from a checkpoint of that step; StorageError when none can be read or nothing written."""
    reasons = []
    for folder in [f for f in checkpoint.folders(storage) if checkpoint.step_of(f) == step]:
        try:
            manifest = checkpoint.read_manifest(storage, folder)
            n_latents, d_model = manifest.tensors["W_dec"].shape
            dictionary.write(
                out / "dictionary", _parts(storage, manifest), n_latents=n_latents, d_model=d_model, k=k,
                thresholds="threshold" in manifest.tensors, info=info,
            )  # fmt: skip
            return
        except DAMAGE as damage:
            reasons.append(f"{folder}: {damage}")
    raise StorageError(
        f"out={out}/dictionary was not written from the checkpoints of step {step} in {storage.uri} "
        f"({'; '.join(reasons) or 'there are none'}); see to that and repeat the command"
    )


def _parts(storage: Storage, manifest: Manifest) -> Iterator[tuple[str, int, Tensor]]:
    """Every block of a parameter, on raw input: its name, its first row (latent), its rows; one threshold for all."""
    scale, n_latents = manifest.facts["scale"], manifest.tensors["W_dec"].shape[0]
    for file in manifest.files:
        if any(block.name in EXPORTED for block in file.blocks):
            for block, rows in checkpoint.read_file(storage, manifest.folder, file).items():
                if block.name in EXPORTED:
                    part = folded(block.name, rows.float(), scale)
                    yield block.name, block.start, part.expand(n_latents) if block.name == "threshold" else part
