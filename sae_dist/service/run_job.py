"""The run command: text, harvest and training at once, evaluation, feature pages. Repeating it resumes.

Every phase writes its result to the run's folder or the store and looks there before it starts: all state of a run is
on disk.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from sae_dist import checksums, storage
from sae_dist.config import UserError, digest, to_dict
from sae_dist.monitor.metrics import JsonLines
from sae_dist.run_files import write_json
from sae_dist.service.cluster import check_address, cluster, death_reason, nodes, result_of
from sae_dist.service.config import RunConfig, config_hash, evaluation_digest
from sae_dist.service.describe_model import describe_on_cluster
from sae_dist.service.display import Display, progress
from sae_dist.service.gpu_shares import GpuShares, describe_shares, share_gpus
from sae_dist.service.monitoring import monitored, tell_result
from sae_dist.service.prepare import Prepared, prepare
from sae_dist.service.rank_actors import RankActors
from sae_dist.service.replica import ReplicaConfig
from sae_dist.service.replica_pool import ReplicaPool, check_harvest_capacity
from sae_dist.service.run_folder import RunFolder
from sae_dist.service.signals import StopRequest
from sae_dist.service.summary import read_finished, read_phase, summarize, weights_digest
from sae_dist.shards import stores
from sae_dist.shards.hooks import Hooks
from sae_dist.train.loop import Trained
from sae_dist.train.members import MAIN
from sae_dist.train.warm_start import check_starts

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> dict[str, Any]:
    """Does the phases of the run that are not done and returns its summary (summary.json)."""
    if config.train.launcher not in ("auto", "actors"):
        raise UserError(
            f"train.launcher={config.train.launcher}: this command trains in Ray actors; leave it at auto, or harvest "
            "first and use `sae-dist train`"
        )
    if config.mesh.least_data is not None:
        raise UserError(
            f"mesh.least_data={config.mesh.least_data}: this command trains in Ray actors, as many as mesh.data says; "
            "use mesh.least_data=null, or harvest first and use `sae-dist train train.launcher=ray_train`"
        )
    config = config.with_absolute_paths()
    folder = RunFolder(config.folder, config)
    with folder.recording_outcome():
        if (finished := _finished(config, folder.path)) is not None:
            folder.done(finished)
            return finished
        check_starts(config.members, config.train.checkpoints or folder.path / "checkpoints")
        check_address(config.cluster)
        with Display(str(folder.path)) as display:
            folder.status("preparing")

            def preparing(facts: Mapping[str, Any]) -> None:
                display.update("text", facts)
                folder.status("preparing", text=facts)

            prepared = prepare(
                model=config.model, hook_points=config.hooks, text=config.text, harvest=config.harvest,
                folder=folder.path / "text", store_uri=config.store_uri,
                progress=preparing,
                describe_on_cluster=describe_on_cluster(
                    config.model, config.harvest, config.hooks, config.store_uri, config.cluster
                ),
                evaluated=True, pages=config.pages is not None,
            )  # fmt: skip
            display.update("text", prepared.facts, now=True)
            hashed = config_hash(config, prepared.meta.digest)
            trainers = config.mesh.data * config.mesh.feature
            with cluster(config.cluster, cpus=config.harvest.most_processes + trainers) as request:
                shares = share_gpus(nodes(), harvest=config.harvest, mesh=config.mesh, device=config.train.device)
                check_harvest_capacity(config.harvest, shares.replica, others=trainers)
                logger.info("%s", describe_shares(shares, replicas=config.harvest.least_processes, ranks=trainers))
                job = _Run(
                    config, prepared, folder=folder, display=display, hashed=hashed, request=request, shares=shares
                )
                summary = job.execute() | {"judged": evaluation_digest(config)}
        summary["wall_seconds"] = folder.wall_seconds
        write_json(folder.path / "summary.json", summary)
        folder.done(summary)
        return summary


def _finished(config: RunConfig, out: Path) -> dict[str, Any] | None:
    """The summary, if the run has finished with these settings on this store and all its results are sound."""
    if not (out / "summary.json").is_file():
        return None
    store = stores.open(storage.open(config.store_uri))
    found = read_finished(out, config_hash(config, store.meta.digest), config.members)
    if found is None or found.get("judged") != evaluation_digest(config):
        return None
    if config.pages is not None and (damage := checksums.damage(out / "pages")):
        logger.warning("this run had finished, but %s: %s; making the pages again", out / "pages", damage)
        return None
    return found


class _Run:
    """The phases that need Ray."""

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        *,
        folder: RunFolder,
        display: Display,
        hashed: str,
        request: StopRequest,
        shares: GpuShares,
    ) -> None:
        self._config, self._values, self._hashed, self._request = config, to_dict(config), hashed, request
        self._shares = shares
        self._folder, self._out, self._display = folder, folder.path, display
        self._store, self._text = stores.open(storage.open(config.store_uri)), prepared.facts
        self._replica_config = ReplicaConfig(
            self._values["model"], self._values["harvest"], config.hooks, config.store_uri, prepared.split
        )

    def execute(self) -> dict[str, Any]:
        """Harvests what is missing while training on it, then evaluates; returns the summary."""
        with (
            monitored(self._config, config_hash=self._hashed),
            closing(JsonLines(self._out / "metrics.jsonl", phase="harvest")) as log,
            closing(
                ReplicaPool(
                    self._replica_config,
                    self._config.harvest,
                    bundle=self._shares.replica,
                    store=self._store,
                    out=str(self._out),
                    log=log,
                )  # fmt: skip
            ) as pool,
        ):
            return self._phases(pool)

    def _phases(self, pool: ReplicaPool) -> dict[str, Any]:
        report = self._stream(pool)
        figures = self._figures(pool)
        tell_result(self._config, figures, store=self._store, tokens=report.tokens)
        summary = summarize(
            self._config.train_job(), hooks=Hooks(self._config.hooks), store=self._store, trained=report,
            hashed=self._hashed, figures=figures,
        )  # fmt: skip
        if self._config.pages is not None:
            # Figures are written first: if the pages fail, the same command retries the pages alone.
            write_json(self._out / "summary.json", summary | {"wall_seconds": self._folder.wall_seconds})
            main = self._config.members[0]  # pages are the main dictionary's
            made_from = digest([weights_digest(main.folder(self._out)), figures[main.name], self._values["pages"]])
            path = self._out / "pages.json"
            if checksums.damage(self._out / "pages") or read_phase(path, made_from) is None:
                result = self._ask("pages", pool, lambda replica: replica.pages.remote(self._values, summary))
                write_json(path, {"made_from": made_from, "result": result})
            summary["pages"] = str(self._out / "pages" / "index.html")
        return summary

    def _stream(self, pool: ReplicaPool) -> Trained:
        """Runs harvest and training side by side; they meet at the committed units of the store."""
        job, provenance = self._config.train_job(), {"config_hash": self._hashed}
        with RankActors(job, provenance=provenance, bundle=self._shares.rank) as ranks:
            report = None
            while report is None or not pool.done:
                self._request.check()
                pool.poll(0.5)
                self._show(pool, ranks)
                report = ranks.poll(0.5 if pool.done else 0)
                if report is not None:
                    pool.stop_waiting_for_readers()
            self._show(pool, ranks, now=True)
            return report

    def _show(self, pool: ReplicaPool, ranks: RankActors, *, now: bool = False) -> None:
        harvest, training = pool.facts(), progress(self._out, self._config.train)
        self._display.update("harvest", harvest)
        self._display.update("train", training, now=now)
        self._folder.status("running", text=self._text, harvest=harvest, train=training, **ranks.facts())

    def _figures(self, pool: ReplicaPool) -> dict[str, dict[str, Any]]:
        """Every dictionary's figures: found beside it, if made from the same, else measured, all of those together."""
        figures, made_from, paths = {}, {}, {}
        for member in self._config.members:
            folder = member.folder(self._out)
            made_from[member.name] = digest([weights_digest(folder), self._values["evaluate"]])
            paths[member.name] = (self._out if member.name == MAIN else folder) / "evaluate.json"
            if (found := read_phase(paths[member.name], made_from[member.name])) is not None:
                figures[member.name] = found
        if missing := [name for name in paths if name not in figures]:
            measured = self._ask("evaluate", pool, lambda replica: replica.evaluate.remote(self._values, missing))
            for name in missing:
                write_json(paths[name], {"made_from": made_from[name], "result": measured[name]})
            figures |= measured
        return {name: figures[name] for name in paths}

    def _ask(self, phase: str, pool: ReplicaPool, ask: Callable[[ActorHandle], ray.ObjectRef]) -> dict[str, Any]:
        """What a replica comes to in a phase; a second one is asked where the first died in it."""
        replica = pool.any_replica(self._request.check)
        try:
            result = self._wait(phase, replica, ask(replica))
        except RayActorError as death:
            logger.warning("the replica died in %s; a new one tries once more (%s)", phase, death_reason(death))
            pool.replace(replica)
            replica = pool.any_replica(self._request.check)
            result = self._wait(phase, replica, ask(replica))
        for name, own in {MAIN: result, **result}.items():
            if isinstance(own, dict):
                facts = {key: value for key, value in own.items() if isinstance(value, int | float | str)}
                self._display.update(phase if name == MAIN else f"{phase} {name}", facts, now=True)
        return result

    def _wait(self, phase: str, replica: ActorHandle, asked: ray.ObjectRef) -> dict[str, Any]:
        """Waits for the result and shows the progress meanwhile."""
        said: dict[str, Any] = {}
        while not ray.wait([asked], timeout=0.5)[0]:
            self._request.check()
            ready, _ = ray.wait([saying := replica.progress.remote()], timeout=0.5)
            said = result_of(saying) if ready else said
            self._display.update(phase, said)
            self._folder.status(phase, progress=said)
        return result_of(asked)
