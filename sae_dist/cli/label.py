"""Label every latent of a run, and measure how good the labels are on contexts that the labeller has not seen.

It reads the feature data of `sae-dist pages RUN data=true`. Repeated after a stop, it goes on.
Examples: sae-dist label runs/quickstart
          sae-dist label runs/quickstart label.by=server label.url=http://127.0.0.1:8000/v1 label.model=Qwen/Qwen3-8B
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import frozen, load, local_folder
from sae_dist.interpret.read_labels import KINDS, labels
from sae_dist.label.config import LabelConfig
from sae_dist.service.label_job import label_run

POSITIONAL = ("run",)


@frozen
class LabelJob:
    """Whose latents, and how."""

    run: str  # the run's folder
    label: LabelConfig

    def with_absolute_paths(self) -> "LabelJob":
        return dataclasses.replace(self, run=str(Path(local_folder("run", self.run)).absolute()))


CONFIG = LabelJob


def main(values: Mapping[str, Any]) -> int:
    job = load(LabelJob, values)
    found = labels(label_run(Path(local_folder("run", job.run)), job.label))
    scores = found.scores
    print(f"{scores['labelled']:,} of {scores['latents']:,} latents have a label, by {scores['by']}")
    for kind in KINDS:
        own, other = scores[kind]["label"]["value"], scores[kind]["shuffled"]["value"]
        figures = ["not measured" if value is None else f"{value:.3f}" for value in (own, other)]
        print(f"{kind}: {figures[0]}, with the label of another latent {figures[1]}, chance {scores[kind]['chance']}")
        print(f"  {scores[kind]['said']}")
    print(f"page: {found.folder / 'index.html'}")
    return 0
