"""Judge a run's dictionary on held-out tokens again, in this process, perhaps on more of them.

A run of `sae-dist train` has no language model: its cross-entropies stay null.
Example: sae-dist evaluate runs/quickstart evaluate.ce_sequences=512
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.cli.report import print_summary
from sae_dist.config import load
from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.service.judge import evaluate_again

POSITIONAL = ("out",)


def main(values: Mapping[str, Any]) -> int:
    print_summary(evaluate_again(Path(values["out"]), load(EvaluateConfig, values["evaluate"])))
    return 0
