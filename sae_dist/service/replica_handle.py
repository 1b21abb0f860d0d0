"""One model replica as the driver sees it: actors in a placement group that hold the model together.

Nothing here blocks: `advance` starts the next step towards `ready` when the last one is done, and asks every process
for a sign of life. The end of a replica is raised as `ReplicaLost`, a user's mistake that it found as `UserError`.
"""

import logging
import math
from collections import deque
from statistics import mean
from typing import Any, Literal, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sae_dist.harvest.harvester import Progress
from sae_dist.service.cluster import death_reason, first_line, nodes, result_of
from sae_dist.service.placement import Bundle, explain, fits
from sae_dist.service.replica import Loaded, Replica, ReplicaConfig
from sae_dist.storage import Unavailable

logger = logging.getLogger(__name__)

PULSE_S = 1.0  # between the answer of a process and the next question to it
PATIENCE_S = 15.0  # between messages while the replica waits for free resources
PROGRAM_ERRORS = (IndexError, TypeError, AttributeError, AssertionError, NotImplementedError)  # whoever does the work
PULSES = 30  # answers that the mean delay of a process is taken over


class ReplicaLost(Exception):
    """The replica or one of its processes is dead or fails; says why in one line."""


class StorageLost(ReplicaLost):
    """Storage did not answer the replica in time, as on a node whose network is broken; others may reach it."""


class ReplicaShape(NamedTuple):
    """The number of processes of a replica, what each reserves, and the threads that each computes with."""

    size: int
    bundle: Bundle
    threads: int


class ReplicaHandle:
    """A replica from its request until `close`. Times are seconds of the driver's monotonic clock."""

    def __init__(
        self, number: int, config: ReplicaConfig, shape: ReplicaShape, *, start_timeout_s: float, now: float
    ) -> None:
        self.number, self.shape = number, shape
        self.state: Literal["placing", "meeting", "loading", "ready"] = "placing"
        self.loaded: list[Loaded] = []
        self.draining = False  # gets no more units, and is closed when it has none
        self._config, self._start_timeout_s, self._began, self._told = config, start_timeout_s, now, now
        self._actors: list[ActorHandle] = []
        self.steps: list[ray.ObjectRef] = []  # calls that the current state waits for; none while it is placed
        self.ready_at = math.inf
        self._turn = 0
        self._asked: dict[ray.ObjectRef, tuple[int, float]] = {}  # pulse -> process, when
        self._answered: dict[int, float] = {}
        self._delays: dict[int, deque[float]] = {}
        self._progress: dict[int, Progress] = {}
        one_node = any(fits(shape.bundle, node.total) >= shape.size for node in nodes())
        if not one_node:
            logger.warning("replica %d: no node has room for its %d processes; they are spread", number, shape.size)
        self._reserve("STRICT_PACK" if one_node else "PACK")

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def flop_per_s(self) -> float:
        """The speed of its processes together on plain matrix products; 0 before they are ready."""
        return sum(loaded.flop_per_s for loaded in self.loaded)

    def advance(self, now: float) -> bool:
        """Does what can be done now; returns whether the replica gave a sign of life. ReplicaLost, UserError."""
        if self.state == "ready":
            return self._listen(now)
        if now - self._began > self._start_timeout_s:
            raise ReplicaLost(f"it was still {self.state} after harvest.start_timeout_s={self._start_timeout_s:g}")
        if self.state == "placing":
            if placement_group_table(self._group)["state"] != "CREATED":
                self._log_what_is_missing(now)
                return False
            self._start()
        came, self.steps = ray.wait(self.steps, num_returns=len(self.steps), timeout=0)
        answers = [replica_result(ref) for ref in came]  # at once: the others may be waiting for one that failed
        if self.state == "meeting":
            if answers:
                self._load(answers[0])
            return False
        self.loaded += answers
        if self.steps:
            return False
        self.loaded.sort(key=lambda loaded: loaded.rank)
        self.state, self.ready_at = "ready", now
        self._answered = dict.fromkeys(range(self.shape.size), now)
        logger.info(
            "replica %d is ready: %d processes on %s, %.1f s", self.number, self.shape.size,
            ", ".join(sorted({loaded.node for loaded in self.loaded})), now - self._began,
        )  # fmt: skip
        return True

    def harvest(self, unit: int, producer: str) -> list[ray.ObjectRef]:
        """Sends the unit to all processes; the first result is the `UnitReport`, the others are None."""
        refs: list[ray.ObjectRef] = [actor.harvest.remote(unit, self._turn, producer) for actor in self._actors]
        self._turn += 1
        return refs

    def delays(self, now: float) -> dict[tuple[int, int], float]:
        """Mean seconds that each process takes to answer, by (replica, process); an open question counts too."""
        known = {rank: mean(delays) for rank, delays in self._delays.items()}
        for rank, asked in self._asked.values():
            known[rank] = max(known.get(rank, 0.0), now - asked)
        return {(self.number, rank): delay for rank, delay in known.items()}

    def leader(self) -> ActorHandle:
        """The first process; the only one of a replica of one, which can also evaluate dictionaries."""
        return self._actors[0]

    def close(self) -> None:
        """Kills its processes, whatever state they are in, and frees their resources."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)

    def _reserve(self, strategy: Literal["STRICT_PACK", "PACK"]) -> None:
        self._strategy = strategy
        self._group = placement_group([self.shape.bundle.resources()] * self.shape.size, strategy=strategy)

    def _log_what_is_missing(self, now: float) -> None:
        if now - self._told < PATIENCE_S:
            return
        self._told, there = now, nodes()
        if self._strategy == "STRICT_PACK" and sum(fits(self.shape.bundle, n.free) for n in there) >= self.shape.size:
            logger.warning(
                "replica %d: no node has %d places free; they are spread over several", self.number, self.shape.size
            )
            remove_placement_group(self._group)
            self._reserve("PACK")
            return
        logger.info("replica %d waits for %s", self.number, explain(self.shape.bundle, self.shape.size, there))

    def _start(self) -> None:
        for rank in range(self.shape.size):
            actor: Any = ray.remote(Replica).options(
                num_cpus=self.shape.bundle.cpus, num_gpus=self.shape.bundle.gpus, max_concurrency=Replica.CONCURRENCY,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=rank
                ),
            )  # fmt: skip
            self._actors.append(actor.remote(self._config, rank, self.shape.size, self.shape.threads))
        if self.shape.size == 1:
            self._load(None)
        else:
            self.steps, self.state = [self._actors[0].meet.remote()], "meeting"

    def _load(self, address: Any) -> None:
        self.steps, self.state = [actor.load.remote(address) for actor in self._actors], "loading"

    def _listen(self, now: float) -> bool:
        """Collects the pulses that arrived and asks again; returns whether any pulse has changed."""
        came, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        alive = False
        for ref in came:
            rank, asked = self._asked.pop(ref)
            progress: Progress = replica_result(ref)
            alive |= progress != self._progress.get(rank)
            self._progress[rank], self._answered[rank] = progress, now
            self._delays.setdefault(rank, deque(maxlen=PULSES)).append(now - asked)
        out = {rank for rank, _ in self._asked.values()}
        for rank, actor in enumerate(self._actors):
            if rank not in out and now - self._answered[rank] >= PULSE_S:
                self._asked[actor.pulse.remote()] = (rank, now)
        return alive


def replica_result(ref: ray.ObjectRef) -> Any:
    """The result of a call; `ReplicaLost` when the replica failed, `UserError` for a user's mistake that it found.

    An error of the program itself is raised as it is: every other replica would raise it too.
    """
    try:
        return result_of(ref)
    except Unavailable as error:
        raise StorageLost(str(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, PROGRAM_ERRORS):
            raise
        raise ReplicaLost(f"{type(error.cause).__name__}: {first_line(error.cause or error)}") from error
    except RayActorError as death:
        raise ReplicaLost(death_reason(death)) from death
    except RayError as error:
        raise ReplicaLost(first_line(error)) from error
