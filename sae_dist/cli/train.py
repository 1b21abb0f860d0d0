"""Train dictionaries on an activation store, without a language model: in this process, or on a mesh of several.

The store may hold activations that were made elsewhere (sae-dist store import). Repeat the command to resume, on any
mesh. mesh.feature=2 starts two Ray actors here or on cluster=; `torchrun -m sae_dist train ...` works too.
more_dictionaries=[...] trains more dictionaries on the same batches.
Example: sae-dist train store=stores/mine sae.n_latents=512 sae.k=4 train.steps=3000 train.batch=512 out=runs/mine
"""

from collections.abc import Mapping
from typing import Any

from sae_dist.cli.report import print_summary
from sae_dist.config import load
from sae_dist.service.config import TrainJob
from sae_dist.service.signals import catch_signals
from sae_dist.service.train_job import train_and_evaluate

CONFIG = TrainJob


def main(values: Mapping[str, Any]) -> int:
    with catch_signals() as request:  # the current step is finished and saved first
        summary = train_and_evaluate(load(TrainJob, values), stop=request.made)
    if summary is not None:
        print_summary(summary)
    return 0
