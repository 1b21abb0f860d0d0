"""Clamp latents while a run's model writes, attribute logits to latents, or latents to tokens, or find latents by text.

sae-dist steer RUN toward=cat:bible                          latents that tell this text from the rest
sae-dist steer RUN prompt="I think" 'clamp={123: 10x}'       samples with and without, and their loss
sae-dist steer RUN prompt="The sky is" 'logits=[" blue", " red"]'    which latents made the difference
sae-dist steer RUN prompt="The sky is" 'sources=[123]'       which tokens a latent reads from
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import frozen, load, local_folder
from sae_dist.steer.config import SteerConfig
from sae_dist.train.members import MAIN

POSITIONAL = ("run",)


@frozen
class SteerJob(SteerConfig):
    """Whose latents, and where the page goes."""

    run: str  # the run's folder
    dictionary: str = MAIN  # the name of one of the run's dictionaries
    out: str = "steered"  # the folder of index.html and steer.json

    def with_absolute_paths(self) -> "SteerJob":
        run, out = (str(Path(local_folder(key, getattr(self, key))).absolute()) for key in ("run", "out"))
        return dataclasses.replace(self, run=run, out=out)


CONFIG = SteerJob


def main(values: Mapping[str, Any]) -> int:
    from sae_dist.service.steer_job import steer_run  # transformers takes seconds to import
    from sae_dist.steer.page import lines

    job = load(SteerJob, values)
    own = {field.name for field in dataclasses.fields(SteerConfig)}  # type: ignore[arg-type]
    config = load(SteerConfig, {key: value for key, value in values.items() if key in own})
    run, out = (Path(local_folder(key, getattr(job, key))) for key in ("run", "out"))
    found = steer_run(run, job.dictionary, config, out=out)
    print("\n".join(lines(found)))
    print(f"page: {out / 'index.html'}")
    return 0
