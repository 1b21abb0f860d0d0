"""Run a language model over text and store its activations; several hook points in one pass.

Repeating the command harvests what is missing. Example:
    sae-dist harvest store=stores/smollm2 hook=[resid_post.4,resid_post.9] harvest.tokens=2000000
"""

from collections.abc import Mapping
from typing import Any

from sae_dist.config import load
from sae_dist.service.config import HarvestJob

CONFIG = HarvestJob


def main(values: Mapping[str, Any]) -> int:
    from sae_dist.service.harvest_job import harvest_store  # transformers takes seconds to import

    job = load(HarvestJob, values)
    facts = harvest_store(job)
    print(f"store: {job.store}  units {facts['units']}  rows {facts['rows']:,}")
    return 0
