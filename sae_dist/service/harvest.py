"""The harvest command: replicas fill a store, and nothing else happens."""

from pathlib import Path
from typing import Any

from sae_dist import storage
from sae_dist.config import to_dict
from sae_dist.service.cluster import check_resources, cluster
from sae_dist.service.config import HarvestJob
from sae_dist.service.display import Display
from sae_dist.service.harvesting import Harvesting
from sae_dist.service.prepare import prepare
from sae_dist.service.replica import ReplicaConfig
from sae_dist.service.run_folder import RunFolder
from sae_dist.shards import reader


def harvest_store(job: HarvestJob) -> dict[str, Any]:
    """Harvests the units that the store lacks; how many units and rows it has then."""
    job = job.located()
    folder = RunFolder(Path(job.out), job)
    values = to_dict(job)
    with folder.outcome():
        with Display(job.out) as display:
            folder.status("preparing")
            prepared = prepare(
                model=job.model, hook_points=job.hooks, text=job.text, harvest=job.harvest,
                folder=folder.path / "text", store_uri=job.store,
                progress=lambda facts: display.update("text", facts),
            )  # fmt: skip
            display.update("text", prepared.facts, now=True)
            store = reader.open(storage.open(job.store))
            committed = store.committed()
            todo = [unit for unit in range(store.meta.n_units) if unit not in committed]
            replica = ReplicaConfig(values["model"], values["harvest"], job.hooks, job.store, prepared.split)
            with cluster(job.cluster, cpus=job.harvest.replicas) as request:
                check_resources(cpus=job.harvest.replicas, gpus=job.harvest.replicas * job.harvest.gpus)
                harvesting = Harvesting(replica, job.harvest, todo=todo, n_units=store.meta.n_units)
                while not harvesting.done:
                    request.check()
                    harvesting.poll(1.0)
                    facts = harvesting.facts()
                    display.update("harvest", facts, now=harvesting.done)
                    folder.status("running", harvest=facts)
                harvesting.close()
        commits = store.committed()
        facts = {"units": len(commits), "rows": sum(commit.rows for commit in commits.values())}
        folder.status("done", harvest=facts)
        return facts
