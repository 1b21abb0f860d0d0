"""The harvest command: model replicas fill a store."""

import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from sae_dist import storage
from sae_dist.config import digest, to_dict
from sae_dist.monitor.metrics import JsonLines
from sae_dist.service.cluster import check_address, cluster, nodes
from sae_dist.service.config import HarvestJob, identity
from sae_dist.service.describe_model import describe_on_cluster
from sae_dist.service.display import Display
from sae_dist.service.gpu_shares import describe_shares, share_gpus
from sae_dist.service.monitoring import monitored
from sae_dist.service.prepare import prepare
from sae_dist.service.replica import ReplicaConfig
from sae_dist.service.replica_pool import ReplicaPool, check_harvest_capacity
from sae_dist.service.run_folder import RunFolder
from sae_dist.shards import stores

logger = logging.getLogger(__name__)


def harvest_store(job: HarvestJob) -> dict[str, Any]:
    """Harvests the units that the store lacks; returns how many units and rows it has then."""
    job = job.with_absolute_paths()
    folder = RunFolder(Path(job.out), job)
    values = to_dict(job)
    with folder.recording_outcome():
        check_address(job.cluster)
        with Display(job.out) as display:
            folder.status("preparing")

            def preparing(facts: Mapping[str, Any]) -> None:
                display.update("text", facts)
                folder.status("preparing", text=facts)

            prepared = prepare(
                model=job.model, hook_points=job.hooks, text=job.text, harvest=job.harvest,
                folder=folder.path / "text", store_uri=job.store,
                progress=preparing,
                describe_on_cluster=describe_on_cluster(job.model, job.harvest, job.hooks, job.store, job.cluster),
            )  # fmt: skip
            display.update("text", prepared.facts, now=True)
            store = stores.open(storage.open(job.store))
            replica = ReplicaConfig(values["model"], values["harvest"], job.hooks, job.store, prepared.split)
            with (
                cluster(job.cluster, cpus=job.harvest.most_processes) as request,
                monitored(job, config_hash=digest(identity(values))),
                closing(JsonLines(folder.path / "metrics.jsonl", phase="harvest")) as log,
            ):
                shares = share_gpus(nodes(), harvest=job.harvest)
                check_harvest_capacity(job.harvest, shares.replica)
                logger.info("%s", describe_shares(shares, replicas=job.harvest.least_processes, ranks=0))
                with closing(
                    ReplicaPool(replica, job.harvest, bundle=shares.replica, store=store, out=job.out, log=log)
                ) as pool:
                    while not pool.done:
                        request.check()
                        pool.poll(0.5)
                        facts = pool.facts()
                        display.update("harvest", facts, now=pool.done)
                        folder.status("running", text=prepared.facts, harvest=facts)
        commits = store.committed()
        facts = {"units": len(commits), "rows": sum(commit.rows for commit in commits.values())}
        folder.status("done", text=prepared.facts, harvest=facts)
        return facts
