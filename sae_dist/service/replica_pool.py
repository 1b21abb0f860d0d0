"""The replicas of a harvest: units are leased to them in order, and a dead replica's units are leased to another.

One driver at a time fills a store (shards/lease.py). The store alone decides which copy of a unit counts, so a replica
that was given up need not really be dead.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import ray
from ray.actor import ActorHandle

from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.harvester import UnitReport
from sae_dist.monitor.metrics import Log
from sae_dist.service.autoscaling import INTERVAL_S, Observation, ScaleState, decide
from sae_dist.service.cluster import check_capacity
from sae_dist.service.display import duration
from sae_dist.service.placement import Bundle
from sae_dist.service.rank_session import usable_cores
from sae_dist.service.replica import ReplicaConfig
from sae_dist.service.replica_handle import ReplicaHandle, ReplicaLost, ReplicaShape, StorageLost, replica_result
from sae_dist.service.throughput import Throughput, remaining_s, slow_process, slow_replica
from sae_dist.service.unit_leases import UnitLeases
from sae_dist.shards.consumers import ConsumerPosition, FlowControl, positions, starved_share
from sae_dist.shards.lease import Lease, lease
from sae_dist.shards.reader import Store
from sae_dist.shards.retention import Retirement
from sae_dist.storage import StorageError, Unavailable

logger = logging.getLogger(__name__)

DEPTH = 2  # units that a replica has at once: one in the model, one being written
MAX_DEATHS = 5  # in a row without a finished unit, each of a replica started after the last: the next would die too
MAX_TRIES = 5  # of one unit, which seems to kill its replicas
LOOK_EVERY_S = 2.0  # between two looks at the readers' positions
LOG_EVERY_S = 10.0


def replica_shape(config: HarvestConfig, bundle: Bundle) -> ReplicaShape:
    """What a replica is made of; each of its processes reserves `bundle`."""
    threads = config.threads or max(usable_cores() // config.most_processes, 1)
    return ReplicaShape(config.tensor_parallel, bundle, threads)


def check_harvest_capacity(config: HarvestConfig, bundle: Bundle, *, others: int = 0) -> None:
    """UserError when the cluster can never have the least number of replicas, with `others` of one CPU beside them."""
    cure = "lower harvest.replicas, harvest.tensor_parallel or harvest.gpus"
    check_capacity(bundle, config.least_processes, others=others, cure=cure)


class ReplicaPool:
    """The units that are not done and the replicas that work on them. Call `poll` until `done`, then `close`."""

    def __init__(
        self,
        replica: ReplicaConfig,
        config: HarvestConfig,
        *,
        bundle: Bundle,
        store: Store,
        out: str,
        log: Log = lambda *_: None,
    ) -> None:
        committed = store.committed()
        todo = [unit for unit in range(store.meta.n_units) if unit not in committed]
        self._replica_config, self._config, self._store, self._log = replica, config, store, log
        self._shape, self._bounds = replica_shape(config, bundle), config.replica_range
        self._leases = UnitLeases(todo, lease_s=config.lease_s)
        self._handles: dict[int, ReplicaHandle] = {}
        self._started = 0  # replicas so far: the next one's number
        self._calls: dict[ray.ObjectRef, tuple[int, int]] = {}  # (replica, attempt)
        self._throughput: dict[int, Throughput] = {}  # of all replicas that ever were ready
        self._deaths = self._deaths_in_a_row = 0
        self._newer_from = 0  # the number from which on replicas were started after the last death that counts
        self._readers: list[ConsumerPosition] = []
        self._flow = FlowControl(config.ahead_units).look([], len(committed))
        self._retirement = Retirement(store, config.retention_policy)
        self._blocked_s, self._polled = 0.0, time.monotonic()
        self._looked = self._logged = -LOG_EVERY_S
        self._scale = ScaleState(self._bounds.least)
        self._observed = (self._polled, 0.0, self._readers)  # when, blocked_s, readers at the last observation
        self._resources = ExitStack()
        self._lease: Lease | None = None
        if todo:
            self._lease = self._resources.enter_context(lease(store.storage, out, key="store", folder="producers"))

    @property
    def done(self) -> bool:
        return not self._leases.left

    def poll(self, timeout_s: float) -> None:
        """Collects finished units, assigns new ones, replaces dead replicas, resizes; waits `timeout_s` at most."""
        if self._lease is None or self.done:
            return
        self._lease.check()
        now = time.monotonic()
        if self._flow.room < 1 and self._leases.pending:
            self._blocked_s += now - self._polled
        self._polled = now
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._look(now)
        self._resize()
        for handle in list(self._handles.values()):
            try:
                if handle.advance(now):
                    self._leases.hear(handle.number, now)
            except ReplicaLost as loss:
                self._give_up(handle, loss)
        for number in self._leases.overdue(now):
            silent = ReplicaLost(f"no sign of life for harvest.lease_s={self._config.lease_s:g}")
            self._give_up(self._handles[number], silent)
        self._assign_units(now)
        waiting = [*self._calls, *(ref for handle in self._handles.values() for ref in handle.steps)]
        if waiting:
            ray.wait(waiting, num_returns=1, timeout=timeout_s)
        else:  # replicas wait for free resources
            time.sleep(min(timeout_s, 0.1))
        self._collect_reports(time.monotonic())
        if self.done or now - self._logged >= LOG_EVERY_S:
            self._logged = now
            self._log(self._units_done, self.figures())
        if self.done:
            self._resources.close()  # releases the store's lease

    def stop_waiting_for_readers(self) -> None:
        """Lifts the bound of harvest.ahead_units: training has ended."""
        self._flow = FlowControl(0).look([], 0)

    def facts(self) -> dict[str, Any]:
        """The progress of the harvest for the display: totals, and a part for each replica that is at work."""
        facts: dict[str, Any] = self._counts()
        if (left := remaining_s(self._working(), units_left=self._leases.left)) is not None and not self.done:
            facts["eta"] = duration(left)
        if self._flow.blocked_by and not self.done:
            facts["waits for"] = self._flow.blocked_by
        if (slow := self._alert()) is not None:
            facts["alert"] = slow
        if not self.done:
            facts |= {f"replica {number}": self._replica_facts(handle) for number, handle in self._handles.items()}
        return facts

    def figures(self) -> dict[str, Any]:
        """The same facts as flat figures, for metrics.jsonl and W&B."""
        figures: dict[str, Any] = self._counts()
        figures["tokens"] = sum(each.positions for each in self._throughput.values())
        figures["blocked_fraction"] = self._storage_wait()
        figures["eta_s"] = remaining_s(self._working(), units_left=self._leases.left)
        for number, handle in self._handles.items():
            figures |= {f"replica{number}/{name}": value for name, value in self._replica_facts(handle).items()}
        if (slow := self._alert()) is not None:
            figures["harvest/alert"] = slow
        return figures

    def any_replica(self, check: Callable[[], None]) -> ActorHandle:
        """A process with the whole model, after the harvest: an idle replica or a new one.

        `check` is called repeatedly while it starts, and may raise.
        """
        assert self.done, "replicas are at work"
        if self._config.tensor_parallel > 1 and any(handle.shape.size > 1 for handle in self._handles.values()):
            self._close_replicas()
        while True:
            handle = next(iter(self._handles.values()), None) or self._start(self._shape._replace(size=1))
            try:
                handle.advance(time.monotonic())
            except ReplicaLost as loss:
                self._give_up(handle, loss)
                continue
            if handle.ready:
                return handle.leader()
            check()
            time.sleep(0.05)

    def replace(self, replica: ActorHandle) -> None:
        """Removes a replica that died outside a unit; `any_replica` then returns another."""
        for handle in list(self._handles.values()):
            if handle.leader() == replica:
                self._close(handle)

    def close(self) -> None:
        self._close_replicas()
        self._resources.close()

    @property
    def _units_done(self) -> int:
        return self._store.meta.n_units - self._leases.left

    def _look(self, now: float) -> None:
        """Reads the consumers' positions: updates the bound, retires consumed units, adapts the number of replicas."""
        grows, keeps = self._bounds.least < self._bounds.most, self._config.retention == "keep"
        if not (self._config.ahead_units or grows) and keeps:
            return
        try:
            self._readers = positions(self._store.storage)
            if not keeps:
                self._retirement.look(self._readers, now)
        except (StorageError, OSError) as error:
            logger.warning("the store does not say how far its readers are (%s); trying again", error)
            return
        self._flow = self._flow.look(self._readers, self._store.meta.n_units - self._leases.pending)
        since, blocked_s, before = self._observed
        if not grows or now - since < INTERVAL_S:
            return
        # Without a reader the store itself is what is wanted, as fast as possible.
        starved = starved_share(before, self._readers, now - since) if self._readers else 1.0
        if starved is None:
            return
        seen = Observation(starved, (self._blocked_s - blocked_s) / (now - since))
        starting = any(not handle.ready for handle in self._handles.values())
        scale = decide(self._scale, seen, least=self._bounds.least, most=self._bounds.most, starting=starting)
        if scale.wanted != self._scale.wanted:
            logger.info(
                "%d replicas instead of %d: readers starved %.0f %% of the last %.0f s, replicas were held %.0f %%",
                scale.wanted, self._scale.wanted, 100 * seen.starved, now - since, 100 * seen.blocked,
            )  # fmt: skip
        self._scale, self._observed = scale, (now, self._blocked_s, self._readers)

    def _resize(self) -> None:
        """Starts or drains replicas until there are as many as wanted, and no more than units; idle ones go first."""
        wanted = min(self._scale.wanted, self._leases.left)
        staying = [handle for handle in self._handles.values() if not handle.draining]
        staying.sort(key=lambda handle: (not handle.ready, -len(self._leases.of(handle.number))))
        for _ in range(wanted - len(staying)):
            self._start(self._shape)
        for handle in staying[wanted:]:
            handle.draining = True
        for handle in list(self._handles.values()):
            if handle.draining and not self._leases.of(handle.number):
                self._close(handle)

    def _start(self, shape: ReplicaShape) -> ReplicaHandle:
        handle = ReplicaHandle(
            self._started, self._replica_config, shape, start_timeout_s=self._config.start_timeout_s,
            now=time.monotonic(),
        )  # fmt: skip
        self._handles[handle.number] = handle
        self._started += 1
        return handle

    def _assign_units(self, now: float) -> None:
        """Assigns units in order. Units that came back go first and ignore the bound: a reader may wait for them."""
        assert self._lease is not None
        for depth in range(1, DEPTH + 1):
            for handle in self._handles.values():
                if not handle.ready or handle.draining or len(self._leases.of(handle.number)) >= depth:
                    continue
                if not self._leases.next_came_back:
                    if self._flow.room < 1:
                        return
                    self._flow = self._flow._replace(room=self._flow.room - 1)
                lease = self._leases.grant(handle.number, now)
                if lease is None:
                    return
                for ref in handle.harvest(lease.unit, self._lease.producer(lease.attempt)):
                    self._calls[ref] = (handle.number, lease.attempt)

    def _collect_reports(self, now: float) -> None:
        if not self._calls:
            return
        finished, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for ref in finished:
            number, attempt = self._calls.pop(ref, (None, 0))
            if number is None:  # its replica has just been closed
                continue
            handle = self._handles[number]
            try:
                report: UnitReport | None = replica_result(ref)
            except ReplicaLost as loss:
                self._give_up(handle, loss)
                continue
            if report is not None and self._leases.finish(attempt):
                self._leases.hear(number, now)
                self._deaths_in_a_row = 0
                if number not in self._throughput:
                    self._throughput[number] = Throughput(handle.ready_at, handle.flop_per_s)
                self._throughput[number].add(UnitReport(*report), now)

    def _give_up(self, handle: ReplicaHandle, loss: ReplicaLost) -> None:
        """Closes a replica that is lost and returns its units to the queue; `_resize` starts another.

        A node that is lost takes all its replicas along, and a broken network many. Of replicas that were there
        together only the first death counts as one in a row.

        Too many deaths end the harvest: Unavailable where storage is the reason, else RuntimeError.
        """
        too_many = Unavailable if isinstance(loss, StorageLost) else RuntimeError
        self._deaths += 1
        if handle.number >= self._newer_from:
            self._deaths_in_a_row, self._newer_from = self._deaths_in_a_row + 1, self._started
        self._close(handle)
        units = self._leases.take_back(handle.number)
        if self._deaths_in_a_row >= MAX_DEATHS:
            raise too_many(f"{MAX_DEATHS} replicas died in a row, the last one at units {units}: {loss}")
        for unit in units:
            if self._leases.lost[unit] >= MAX_TRIES:
                raise too_many(f"unit {unit} was lost {MAX_TRIES} times with its replica; the last time: {loss}")
        at = f"at unit {units[0]}; its units go to another" if units else f"while {handle.state}"
        logger.warning("replica %d died %s (%s)", handle.number, at, loss)

    def _close(self, handle: ReplicaHandle) -> None:
        """Closes a replica and forgets its calls: processes that do not lead may still be at work on a unit."""
        del self._handles[handle.number]
        handle.close()
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != handle.number}

    def _close_replicas(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def _working(self) -> Sequence[Throughput]:
        return [each for number, each in self._throughput.items() if number in self._handles]

    def _counts(self) -> dict[str, Any]:
        every = self._throughput.values()
        return {
            "units": self._units_done,
            "of": self._store.meta.n_units,
            "leased": self._leases.leased,
            "retried": self._leases.retried,
            "duplicates": sum(each.duplicates for each in every),
            "replicas": sum(handle.ready for handle in self._handles.values()),
            "deaths": self._deaths,
            "expired": self._leases.expired,
            "tokens_per_second": sum(each.tokens_per_second for each in self._working()),
            "outliers": sum(each.outliers for each in every),
            "nonfinite": sum(each.nonfinite for each in every),
            "held_s": round(self._blocked_s, 1),
        }

    def _storage_wait(self) -> float | None:
        """The mean share of their time that replicas at work have waited for storage."""
        shares = [each.facts()["blocked"] for each in self._working()]
        return sum(shares) / len(shares) if shares else None

    def _replica_facts(self, handle: ReplicaHandle) -> dict[str, Any]:
        known = self._throughput.get(handle.number)
        on = {"on": ", ".join(sorted({loaded.node for loaded in handle.loaded}))} if handle.loaded else {}
        return {"state": handle.state} | on | (known.facts() if known is not None else {})

    def _alert(self) -> str | None:
        """A slow process or replica, as a clause; None when there is none."""
        now, delays = time.monotonic(), {}
        for handle in self._handles.values():
            delays |= handle.delays(now)
        if (process := slow_process(delays)) is not None:
            number, rank = process
            at = self._handles[number].loaded[rank]
            return f"replica {number}: process {rank} (pid {at.pid} on {at.node}) answers after {delays[process]:.1f} s"
        slow = slow_replica({number: each for number, each in self._throughput.items() if number in self._handles})
        return None if slow is None else f"replica {slow} is less than half as fast as the others"
