"""Write the feature pages of a run again, in this process: a static site that opens from disk.

With data=true, write instead what is known of every latent as Parquet, for any number of latents.
Examples: sae-dist pages runs/quickstart pages.top_contexts=32
          sae-dist pages runs/quickstart data=true
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import frozen, load, local_folder
from sae_dist.interpret.collect import PagesConfig

POSITIONAL = ("out",)


@frozen
class PagesJob:
    """Which run's pages to write, and what they show."""

    out: str  # the run's folder
    data: bool = False  # write features/, a Parquet table of all latents, instead of pages/
    pages: PagesConfig

    def with_absolute_paths(self) -> "PagesJob":
        return dataclasses.replace(self, out=str(Path(local_folder("out", self.out)).absolute()))


CONFIG = PagesJob


def main(values: Mapping[str, Any]) -> int:
    from sae_dist.service import evaluate_job  # transformers takes seconds to import

    job = load(PagesJob, values)
    out = Path(local_folder("out", job.out))
    if job.data:
        print(f"features: {evaluate_job.write_run_features(out, job.pages)}")
    else:
        print(f"pages: {evaluate_job.write_run_pages(out, job.pages)}")
    return 0
