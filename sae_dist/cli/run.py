"""Harvest, train, evaluate and write feature pages, in one job under Ray.

Repeat the command to resume, whatever stopped it; a finished run prints its summary again.
Example: sae-dist run preset=quickstart
"""

from collections.abc import Mapping
from typing import Any

from sae_dist.cli.report import print_summary
from sae_dist.config import load
from sae_dist.service.config import RunConfig

CONFIG = RunConfig


def main(values: Mapping[str, Any]) -> int:
    from sae_dist.service.run_job import run  # transformers takes seconds to import

    print_summary(run(load(RunConfig, values)))
    return 0
