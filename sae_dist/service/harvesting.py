"""Replicas at work: units are handed out in order, and a unit whose replica died is handed out again."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvester import UnitReport
from sae_dist.service.cluster import answer, reason_of
from sae_dist.service.display import duration
from sae_dist.service.replica import Replica, ReplicaConfig
from sae_dist.service.trainer import usable_cores

logger = logging.getLogger(__name__)

MAX_DEATHS = 5  # of replicas without a unit in between: something kills them all, and would kill the next one


class Harvesting:
    """The units still to do and the replicas that do them. Call `poll` until `done`."""

    def __init__(self, replica: ReplicaConfig, config: HarvestConfig, *, todo: Sequence[int], n_units: int) -> None:
        self._replica_config, self._config, self._n_units = replica, config, n_units
        self._pending = deque(todo)
        self._working: dict[ray.ObjectRef, tuple[ActorHandle, int]] = {}
        self._replicas: list[ActorHandle] = []
        self._reports: list[UnitReport] = []
        self._loading_s = 0.0
        self._deaths, self._deaths_in_a_row, self._began = 0, 0, time.monotonic()
        for _ in range(min(config.replicas, len(todo))):
            self._start()

    @property
    def done(self) -> bool:
        return not self._pending and not self._working

    def poll(self, timeout_s: float) -> None:
        """Takes in what has finished and hands out what is next; waits `timeout_s` at most for the former."""
        if not self._working:
            return
        finished, _ = ray.wait(list(self._working), num_returns=1, timeout=timeout_s)
        for ref in finished:
            replica, unit = self._working.pop(ref)
            try:
                report = UnitReport(*answer(ref))
            except RayActorError as death:
                self._bury(replica, unit, death)
                continue
            self._deaths_in_a_row = 0
            if not self._reports:  # the rest went by before a model was loaded
                self._loading_s = time.monotonic() - self._began - report.forward_s - report.write_s
            self._reports.append(report)
            self._hand_out(replica)

    def facts(self) -> dict[str, Any]:
        """How far the harvest is, for people."""
        left = len(self._pending) + len(self._working)
        positions = sum(report.positions for report in self._reports)
        seconds = time.monotonic() - self._began - self._loading_s
        facts: dict[str, Any] = {"units": self._n_units - left, "of": self._n_units}
        if positions:
            facts |= {
                "tokens_per_second": positions / seconds if left else None,
                "forward_s": sum(report.forward_s for report in self._reports),
                "write_s": sum(report.write_s for report in self._reports),
                "outliers": sum(report.outliers for report in self._reports),
                "nonfinite": sum(report.nonfinite for report in self._reports),
                "duplicates": sum(report.duplicate for report in self._reports),
                "deaths": self._deaths,
            }
        if positions and left:
            facts["eta"] = duration(seconds / len(self._reports) * left)
        return {key: value for key, value in facts.items() if value is not None}

    def any_replica(self) -> ActorHandle:
        """A replica that is not needed for harvesting any more, a new one when there is none."""
        assert self.done, "replicas are at work"
        if not self._replicas:
            self._start()
        return self._replicas[0]

    def replace(self, replica: ActorHandle) -> None:
        """Puts a new replica in the place of one that died outside a unit."""
        self._replicas.remove(replica)
        ray.kill(replica)  # it may only be out of reach
        self._start()

    def close(self) -> None:
        for replica in self._replicas:
            ray.kill(replica)
        self._replicas.clear()

    def _start(self) -> None:
        threads = self._config.threads or max(usable_cores() // self._config.replicas, 1)
        actor: Any = ray.remote(Replica).options(num_cpus=1, num_gpus=self._config.gpus, max_concurrency=2)
        replica = actor.remote(self._replica_config, threads)
        self._replicas.append(replica)
        self._hand_out(replica)

    def _hand_out(self, replica: ActorHandle) -> None:
        if self._pending:
            unit = self._pending.popleft()
            self._working[replica.harvest.remote(unit)] = (replica, unit)
        elif len(self._replicas) > 1:  # one stays for the evaluation; the others would hold their memory for nothing
            self._replicas.remove(replica)
            ray.kill(replica)

    def _bury(self, replica: ActorHandle, unit: int, death: RayActorError) -> None:
        self._deaths, self._deaths_in_a_row = self._deaths + 1, self._deaths_in_a_row + 1
        if self._deaths_in_a_row >= MAX_DEATHS:
            raise RuntimeError(f"{MAX_DEATHS} replicas died in a row, the last one at unit {unit}") from death
        logger.warning("a replica died at unit %d; the unit goes to a new one (%s)", unit, reason_of(death))
        self._pending.appendleft(unit)
        self.replace(replica)
