"""Evaluate a run's dictionary on held-out tokens again, in this process, with other settings if given.

A run of `sae-dist train` has no language model: its cross-entropies stay null.
Example: sae-dist evaluate runs/quickstart evaluate.ce_sequences=512
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.cli.report import print_summary
from sae_dist.config import frozen, load, local_folder
from sae_dist.evaluate.config import EvaluateConfig

POSITIONAL = ("out",)


@frozen
class EvaluateJob:
    """Which run to evaluate, and how."""

    out: str  # the run's folder
    evaluate: EvaluateConfig

    def with_absolute_paths(self) -> "EvaluateJob":
        return dataclasses.replace(self, out=str(Path(local_folder("out", self.out)).absolute()))


CONFIG = EvaluateJob


def main(values: Mapping[str, Any]) -> int:
    from sae_dist.service.evaluate_job import evaluate_run  # transformers takes seconds to import

    job = load(EvaluateJob, values)
    print_summary(evaluate_run(Path(local_folder("out", job.out)), job.evaluate))
    return 0
