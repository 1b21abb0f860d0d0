"""The Ray actors of a training, one a rank. When one is lost, all restart from the last checkpoint.

The driver serves the key-value store where they meet and reads their pulse there: a rank that died, or was silent for
mesh.collective_timeout_s, is named with its machine, process and last step.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sae_dist import storage
from sae_dist.config import Stopped, to_dict
from sae_dist.service.cluster import death_reason, first_line, result_of
from sae_dist.service.config import TrainJob
from sae_dist.service.placement import Bundle
from sae_dist.service.rank_session import RankActor
from sae_dist.train.checkpoint_folders import folders
from sae_dist.train.loop import Trained
from sae_dist.train.parallel import rendezvous
from sae_dist.train.parallel.heartbeat import EVERY_S, HeartbeatMonitor
from sae_dist.train.parallel.mesh_session import PeersLost

logger = logging.getLogger(__name__)

GRACE_S = 120.0  # that ranks which were asked to stop have to finish their step, save and return
CAUSE_S = 15.0  # after one rank failed, that the others have to report why


class RankActors:
    """Training in actors. Call `poll` until it returns the result; leaving the `with` asks the actors to save.

    `bundle` is what each of them reserves (gpu_shares.share_gpus).
    """

    def __init__(self, job: TrainJob, *, provenance: Mapping[str, Any], bundle: Bundle) -> None:
        self._job, self._provenance, self._bundle = job, dict(provenance), bundle
        self._world = job.mesh.data * job.mesh.feature
        self._checkpoints = storage.open(job.train.checkpoints or Path(job.out) / "checkpoints")
        self._group = self._served = self._listener = None
        if self._world > 1:
            self._served = rendezvous.serve("127.0.0.1" if job.cluster == "local" else ray.util.get_node_ip_address())
            self._group = placement_group([bundle.resources()] * self._world, strategy="PACK")
        self._attempts, self._deaths, self._saved = 0, 0, self._newest_checkpoint()
        self._result: Trained | None = None
        self._start()

    def poll(self, timeout_s: float) -> Trained | None:
        """The result once all ranks are done, else None after `timeout_s` at most. Restarts ranks that were lost.

        UserError for a user's mistake; RuntimeError when ranks were lost more than train.max_restarts times without a
        new checkpoint.
        """
        if not self._working:
            return self._result
        finished, _ = ray.wait(list(self._working), num_returns=1, timeout=timeout_s)
        for ref in finished:
            try:
                report = result_of(ref)
            except (RayActorError, RayTaskError) as failure:
                self._again(self._cause(ref, failure))
                return None
            if report is None:
                raise Stopped("a rank was asked to stop")
            self._result = Trained(*report)
            del self._working[ref]
        if self._working and (silent := self._listen()) is not None:
            self._again(silent)
        return None if self._working else self._result

    def facts(self) -> dict[str, Any]:
        """The state of every rank, for status.json; empty for a single rank."""
        return {} if self._listener is None else {"ranks": self._listener.facts()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._working:  # save what was trained, whatever ends the run
            logger.info("stopping: the trainer saves its state")
            for actor in self._actors:
                actor.stop.remote()
            if len(ray.wait(list(self._working), num_returns=len(self._working), timeout=GRACE_S)[1]):
                logger.warning("the trainer did not answer within %.0f s; its last checkpoint counts", GRACE_S)
        self._kill()
        if self._group is not None:
            remove_placement_group(self._group)
        if self._served is not None:
            self._served.close()

    def _start(self) -> None:
        self._attempts += 1
        attempt = f"attempt{self._attempts}"
        place, values = None, to_dict(self._job)
        options: dict[str, Any] = {"num_cpus": self._bundle.cpus, "num_gpus": self._bundle.gpus, "max_concurrency": 2}
        if self._served is not None:
            place = rendezvous.Rendezvous(self._served.address, attempt)
            store = rendezvous.attempt_store(self._served, attempt)
            self._listener, self._heard_at = HeartbeatMonitor(store, self._world), 0.0
        self._actors: list[ActorHandle] = []
        self._working: dict[ray.ObjectRef, int] = {}  # calls that are not over -> rank
        for rank in range(self._world):
            if self._group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                )
            actor: Any = ray.remote(RankActor).options(**options)
            self._actors.append(
                actor.remote(values, self._provenance, rank=rank, rendezvous=place, bundle=self._bundle)
            )
        self._working = {actor.train.remote(): rank for rank, actor in enumerate(self._actors)}

    def _again(self, cause: str) -> None:
        """Restarts all ranks, unless restarts brought no new checkpoint."""
        newest = self._newest_checkpoint()
        self._deaths, self._saved = (1 if newest != self._saved else self._deaths + 1), newest
        if self._deaths > self._job.train.max_restarts:
            raise RuntimeError(
                f"the trainer died {self._deaths} times without a new checkpoint; the last time: {cause}"
            )
        logger.warning("the trainer died; restarting it from %s (%s)", newest or "the start", cause)
        self._kill()
        self._start()

    def _cause(self, ref: ray.ObjectRef, failure: RayActorError | RayTaskError) -> str:
        """Why ranks were lost, as a clause; raises a user's mistake or an error of the program on any rank."""
        failures = {self._working.pop(ref): failure}
        others, _ = ray.wait(list(self._working), num_returns=len(self._working), timeout=CAUSE_S)
        for other in others:
            rank = self._working.pop(other)
            try:
                result_of(other)
            except (RayActorError, RayTaskError) as error:
                failures[rank] = error
        for error in failures.values():
            if isinstance(error, RayTaskError) and not isinstance(error.cause, PeersLost):
                raise error
        if self._listener is not None:
            self._listener.poll()
        dead = [
            f"{self._who(rank)} died: {death_reason(error)}"
            for rank, error in sorted(failures.items())
            if isinstance(error, RayActorError)
        ]
        return "; ".join(dead) or "; ".join(first_line(error.cause) for error in failures.values())  # type: ignore[union-attr]

    def _who(self, rank: int) -> str:
        return f"rank {rank}" if self._listener is None else self._listener.describe(rank)

    def _listen(self) -> str | None:
        """Which ranks were silent for too long, as a clause, or None; logs slow ranks."""
        if self._listener is None or time.monotonic() - self._heard_at < EVERY_S:
            return None
        self._heard_at = time.monotonic()
        self._listener.poll()
        for slow in self._listener.stragglers():
            logger.warning("%s", slow)
        return self._listener.silent(self._job.mesh.collective_timeout_s, among=list(self._working.values()))

    def _kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)  # it may still be alive on an unreachable node
        self._working = {}

    def _newest_checkpoint(self) -> str | None:
        complete = folders(self._checkpoints)
        return complete[0] if complete else None
