"""Compare dictionaries: which latents they share, how those of one split in another, and what the larger one adds.

A dictionary is a run, its dictionary/ or dictionaries/NAME, an imported one, s3:// or hf://; neurons are those that
the first one reads, neurons:HOOK others of its store. All are compared on the same held-out rows. One alone: which of
its latents fire together. Of two layers of a model: which latents of the earlier one feed each latent of the later one.
Examples: sae-dist compare runs/a runs/b out=compared
          sae-dist compare runs/a neurons out=neurons
          sae-dist compare runs/a out=together
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sae_dist.comparison.config import CompareConfig
from sae_dist.comparison.terminal import lines
from sae_dist.config import frozen, load, local_folder
from sae_dist.service.compare_job import NAMES, compare_dictionaries, found_at

LISTED = "dictionaries"  # the key whose values are the words of the command line


@frozen
class CompareJob(CompareConfig):
    """Which dictionaries, and where the page goes."""

    dictionaries: Annotated[
        tuple[str, ...], Field(min_length=1, max_length=len(NAMES))
    ]  # where they lie; neurons, neurons:HOOK
    out: str = "compared"  # the folder of index.html, compare.json and the tables


CONFIG = CompareJob


def main(values: Mapping[str, Any]) -> int:
    job = load(CompareJob, values)
    own = {field.name for field in dataclasses.fields(CompareConfig)}  # type: ignore[arg-type]
    config = load(CompareConfig, {key: value for key, value in values.items() if key in own})
    out = Path(local_folder("out", job.out))
    found = compare_dictionaries([found_at(where) for where in job.dictionaries], config, out=out)
    print("\n".join(lines(found.figures)))
    print(f"page: {out / 'index.html'}")
    return 0
