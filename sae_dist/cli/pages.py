"""Write the feature pages of a run again, in this process: a static site that opens from disk.

Example: sae-dist pages runs/quickstart pages.top_contexts=32
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_dist.config import load
from sae_dist.interpret.collect import PagesConfig
from sae_dist.service.judge import pages_again

POSITIONAL = ("out",)


def main(values: Mapping[str, Any]) -> int:
    print(f"pages: {pages_again(Path(values['out']), load(PagesConfig, values['pages']))}")
    return 0
