"""Send a run's history to Weights & Biases, made anew from metrics.jsonl, for whatever W&B has missed or lost.

Every dictionary, the harvest and the evaluations keep their identities. wandb.mode=offline leaves folders for
`wandb sync`; online, what the server has already stays as it is. Of a sweep the report is sent, with tables and plots.
Example: sae-dist sync runs/quickstart wandb.mode=online
"""

from collections.abc import Mapping
from typing import Any

from sae_dist.config import load
from sae_dist.service.sync import SyncConfig, sync_run

CONFIG = SyncConfig
POSITIONAL = ("out",)


def main(values: Mapping[str, Any]) -> int:
    synced = sync_run(load(SyncConfig, values))
    for run in synced.runs:
        print(f"{run.job_type:<9} {run.id}  {run.name}")
    if synced.folders:
        print("to upload: wandb sync " + " ".join(map(str, synced.folders)))
    else:
        print(f"in project {synced.wandb.project}")
    return 0
