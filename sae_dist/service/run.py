"""The main job: text, harvest and training at once, evaluation, feature pages. Repeating it goes on where it stopped.

Every phase leaves its result in the run's folder or in the store and looks there before it starts, so the state of a
run is what lies on disk; this process holds nothing that another start of the same command would miss.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from sae_dist import storage
from sae_dist.config import Stopped, UserError, digest, to_dict
from sae_dist.monitor import write_json
from sae_dist.service.cluster import answer, cluster
from sae_dist.service.config import RunConfig, config_hash
from sae_dist.service.display import Display, progress
from sae_dist.service.harvesting import Harvesting
from sae_dist.service.prepare import Prepared, prepare
from sae_dist.service.replica import ReplicaConfig
from sae_dist.service.run_folder import RunFolder
from sae_dist.service.summary import summarize
from sae_dist.service.trainer import Trainer, TrainReport
from sae_dist.shards import reader

logger = logging.getLogger(__name__)

GRACE_S = 120.0  # for a trainer that was asked to stop: to finish its step, save and return
MAX_DEATHS = 5  # of trainers without a new checkpoint in between


def run(config: RunConfig) -> dict[str, Any]:
    """Does what is still to do of the run and returns its summary (summary.json)."""
    folder = RunFolder(config.folder, config)
    try:
        with Display(str(folder.path)) as display:
            folder.status("preparing")
            prepared = prepare(
                model=config.model, hook_points=[config.hook], text=config.text, harvest=config.harvest,
                folder=folder.path / "text", store_uri=config.store_uri,
                progress=lambda facts: display.update("text", facts),
            )  # fmt: skip
            display.update("text", prepared.facts, now=True)
            with cluster(config.cluster, cpus=config.harvest.replicas + 2):
                summary = _Run(config, prepared, folder, display).go()
        folder.status("done", step=summary["steps"], tokens=summary["tokens_trained"])
        return summary
    except (Stopped, KeyboardInterrupt):
        folder.status("stopped", note="the same command goes on from here")
        raise
    except UserError as error:
        folder.status("refused", note=str(error))
        raise
    except Exception as error:
        folder.status("failed", note=f"{type(error).__name__}: {error}")
        raise
    finally:
        folder.close()


class _Run:
    """The phases that need processes. One object a start; nothing in it outlives it."""

    def __init__(self, config: RunConfig, prepared: Prepared, folder: RunFolder, display: Display) -> None:
        self._config, self._values = config, to_dict(config)
        self._folder, self._out, self._display = folder, folder.path, display
        self._store = reader.open(storage.open(config.store_uri))
        self._replica_config = ReplicaConfig(
            self._values["model"], self._values["harvest"], (config.hook,), config.store_uri, prepared.split
        )

    def go(self) -> dict[str, Any]:
        """Harvests what is missing while training on it, then judges what came out."""
        committed = self._store.committed()
        todo = [unit for unit in range(self._store.meta.n_units) if unit not in committed]
        harvesting = Harvesting(self._replica_config, self._config.harvest, todo=todo, n_units=self._store.meta.n_units)
        try:
            report = self._stream(harvesting)
            figures = self._judge(
                "evaluate", [report.order_hash, self._values["evaluate"]], harvesting,
                lambda replica: replica.evaluate.remote(self._values),
            )  # fmt: skip
            summary = summarize(
                self._config.train_job(), hook=self._config.hook, store=self._store, trained=report,
                hashed=config_hash(self._config), figures=figures,
            )  # fmt: skip
            if self._config.pages is not None:
                summary["pages"] = self._judge(
                    "pages", [summary["eval"], self._values["pages"]], harvesting,
                    lambda replica: replica.pages.remote(self._values, summary),
                )["index"]  # fmt: skip
        finally:
            harvesting.close()
        summary["wall_seconds"] = self._folder.wall_seconds
        write_json(self._out / "summary.json", summary)
        return summary

    def _stream(self, harvesting: Harvesting) -> TrainReport:
        """Harvest and training side by side: they meet at the committed units of the store."""
        trainer, training = self._start_trainer()
        deaths, saved, report = 0, self._newest_checkpoint(), None
        try:
            while report is None or not harvesting.done:
                harvesting.poll(0.5)
                self._show(harvesting)
                if report is not None or not ray.wait([training], timeout=0.5 if harvesting.done else 0)[0]:
                    continue
                try:
                    report = TrainReport(*answer(training))
                except RayActorError as death:
                    newest = self._newest_checkpoint()
                    deaths, saved = (1 if newest != saved else deaths + 1), newest
                    if deaths >= MAX_DEATHS:
                        raise RuntimeError(f"the trainer died {deaths} times without a new checkpoint") from death
                    logger.warning("the trainer died; a new one goes on from %s", saved or "the start")
                    trainer, training = self._start_trainer()
        except (Stopped, KeyboardInterrupt):
            logger.info("stopping: the trainer saves its state")
            trainer.stop.remote()
            ray.wait([training], timeout=GRACE_S)
            raise
        self._show(harvesting, now=True)
        ray.kill(trainer)
        return report

    def _start_trainer(self) -> tuple[ActorHandle, ray.ObjectRef]:
        job = to_dict(self._config.train_job())
        actor = ray.remote(num_cpus=1, max_concurrency=2)(Trainer)
        trainer = actor.remote(job, {"config_hash": config_hash(self._config)})
        return trainer, trainer.train.remote()

    def _newest_checkpoint(self) -> str | None:
        return max((path.name for path in (self._out / "checkpoints").glob("step_*")), default=None)

    def _show(self, harvesting: Harvesting, *, now: bool = False) -> None:
        harvest, training = harvesting.facts(), progress(self._out, self._config.train)
        self._display.update("harvest", harvest, now=now)
        self._display.update("train", training, now=now)
        self._folder.status("running", harvest=harvest, train=training)

    def _judge(
        self, phase: str, given: list[Any], harvesting: Harvesting, ask: Callable[[ActorHandle], ray.ObjectRef]
    ) -> dict[str, Any]:
        """The result of a phase: as found in the run's folder when it was made from the same, else made now."""
        path, made_from = self._out / f"{phase}.json", digest(given)
        if path.is_file():
            found = json.loads(path.read_text())
            if found["made_from"] == made_from:
                return found["result"]
        replica = harvesting.any_replica()
        try:
            result = self._wait(phase, replica, ask(replica))
        except RayActorError:
            logger.warning("the replica died in %s; a new one tries once more", phase)
            harvesting.replace(replica)
            replica = harvesting.any_replica()
            result = self._wait(phase, replica, ask(replica))
        write_json(path, {"made_from": made_from, "result": result})
        self._display.update(phase, {k: v for k, v in result.items() if isinstance(v, int | float | str)}, now=True)
        return result

    def _wait(self, phase: str, replica: ActorHandle, asked: ray.ObjectRef) -> dict[str, Any]:
        """The answer, showing meanwhile how far it is."""
        said = {}
        while not ray.wait([asked], timeout=0.5)[0]:
            ready, _ = ray.wait([saying := replica.progress.remote()], timeout=0.5)
            said = answer(saying) if ready else said
            self._display.update(phase, said)
            self._folder.status(phase, **said)
        return answer(asked)
