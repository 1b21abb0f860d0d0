"""The finished dictionary, written block by block from the last checkpoint, so that it is never whole in memory."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_dist.config import load
from sae_dist.sae import dictionary
from sae_dist.sae.scale import Scales
from sae_dist.sae.variants.interface import Sizes, TensorSpec
from sae_dist.storage import Storage, StorageError, Unavailable
from sae_dist.train.checkpoint import read_file
from sae_dist.train.checkpoint_folders import folders, step_of
from sae_dist.train.checkpoint_manifest import CheckpointManifest, read_manifest
from sae_dist.train.learner import Learner
from sae_dist.train.members import Member

logger = logging.getLogger(__name__)


def write_dictionary(
    storage: Storage, run_id: str, out: Path, learner: Learner, *, step: int, info: Mapping[str, Any]
) -> None:
    """Writes one dictionary of a training into its folder under `out`, from this run's checkpoint of `step`.

    `info` is added to config.json. StorageError where no checkpoint can be read or the folder cannot be written.
    """
    member, folder = learner.member, learner.member.folder(out)
    own = {
        "variant": member.sae.kind,
        "n_latents": member.sae.n_latents,
        "seed": member.seed,
        "skipped_steps": learner.guard.skipped,
        "kernels": learner.sae.shard.backend_used,
        "trained_as": {"parameters": member.parameters, "moments": member.moments},  # the file is fp32
    } | {name: True for name in ("skip", "cross_layer") if getattr(member, name)}
    if learner.started_from is not None:
        own["started_from"] = learner.started_from._asdict()
    reasons = []
    for saved in [folder for folder in folders(storage, run_id) if step_of(folder) == step]:
        try:
            manifest = read_manifest(storage, saved)
            (n_latents, d_in), (_, d_out) = (
                manifest.tensors[member.prefix + name].shape for name in ("W_enc", "W_dec")
            )
            specs = tuple(spec for spec in member.tensors if spec.exported)
            dictionary.write(
                folder, _parts(storage, manifest, member, specs), specs=specs, sizes=Sizes(n_latents, d_in, d_out),
                k=member.sae.k, info=own | dict(info),
            )  # fmt: skip
            return
        except Unavailable:  # so are the others
            raise
        except (OSError, ValueError) as error:
            reasons.append(f"{saved}: {error}")
    raise StorageError(
        f"out={folder} was not written from the checkpoints of step {step} in {storage.uri} "
        f"({'; '.join(reasons) or 'there are none'}); see to that and repeat the command"
    )


def _parts(
    storage: Storage, manifest: CheckpointManifest, member: Member, specs: Sequence[TensorSpec]
) -> Iterator[tuple[TensorSpec, int, Tensor]]:
    """Yields (spec, first row, rows) of every block, with the input scale folded in."""
    scales, n_latents = load(Scales, manifest.facts["scales"]), member.sae.n_latents
    wanted = {member.prefix + spec.name: spec for spec in specs}
    for file in manifest.files:
        if any(block.name in wanted for block in file.blocks):
            for block, rows in read_file(storage, manifest, file).items():
                if (spec := wanted.get(block.name)) is not None:
                    part = spec.folded(rows.float(), scales, first=block.start)
                    yield spec, block.start, part.expand(n_latents) if spec.role == "tracked" else part
