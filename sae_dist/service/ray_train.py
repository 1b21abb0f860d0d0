"""Training under Ray Train (v2): it starts the workers, restarts them after failures and adapts their number.

Its checkpoints and process group are not used. The ranks meet at a key-value store that the driver serves, and resume
from our own checkpoints with as many data ranks as there are workers for (at least mesh.least_data); spare workers are
idle. Through the same store the driver asks the ranks to stop, and reads their outcome and their state.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sae_dist.config import Stopped, UserError, to_dict
from sae_dist.service.cluster import first_line
from sae_dist.service.config import TrainJob
from sae_dist.service.placement import Bundle
from sae_dist.service.ray_train_worker import LOOK_S, Outcome, train_worker
from sae_dist.storage import Unavailable
from sae_dist.train.loop import Trained
from sae_dist.train.parallel import rendezvous
from sae_dist.train.parallel.heartbeat import START_S, HeartbeatMonitor
from sae_dist.train.parallel.rendezvous import Rendezvous, connect_store

logger = logging.getLogger(__name__)

RUN = "run"  # names in the store that outlive an attempt
ENVIRONMENT = {  # of Ray Train's processes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # leave the working directory as it is
}
GRACE_S = 120.0  # for ranks that were asked to stop, or are done: to save and return


@dataclass
class _NoProcessGroup(TorchConfig):
    """Ray Train starts no process group: the ranks have theirs, at a store that listens on one address only."""

    @property
    def backend_cls(self) -> Any:
        return Backend


class _Failures(UserCallback):
    """Reports to the driver why workers failed; runs in Ray Train's controller."""

    def __init__(self, run: Rendezvous) -> None:
        self._run = run

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        del run_context
        told = {rank: first_line(error) for rank, error in worker_exceptions.items()}
        connect_store(self._run, START_S).set("failures", json.dumps(told))


def train_with_ray_train(
    job: TrainJob,
    *,
    provenance: Mapping[str, Any],
    bundle: Bundle,
    check: Callable[[], None],
    show: Callable[[Mapping[str, Any]], None],
) -> Trained:
    """Trains in the workers of one TorchTrainer, each with what `bundle` reserves, and returns what rank 0 says.

    `check` raises Stopped once somebody asks to; `show` gets a line a rank now and then. UserError for a user's
    mistake; RuntimeError when workers failed more than train.max_restarts times, whatever checkpoints came in between.
    """
    host = "127.0.0.1" if job.cluster == "local" else ray.util.get_node_ip_address()
    served = rendezvous.serve(host)
    place, run = Rendezvous(served.address, RUN), rendezvous.attempt_store(served, RUN)
    most, least = job.mesh.data * job.mesh.feature, (job.mesh.least_data or job.mesh.data) * job.mesh.feature
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "job": to_dict(job), "provenance": dict(provenance), "bundle": tuple(bundle), "run": tuple(place)
        },
        torch_config=_NoProcessGroup(),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most), use_gpu=bundle.gpus > 0,
            resources_per_worker=bundle.resources(),
        ),
        run_config=RunConfig(
            name="ray_train", storage_path=str(Path(job.out)), callbacks=[_Failures(place)],
            failure_config=FailureConfig(max_failures=job.train.max_restarts),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )  # fmt: skip
    fitted, monitor = _begin(trainer), _WorkerMonitor(job, run, served)
    asked: tuple[Stopped, float] | None = None
    while True:
        ended, _ = ray.wait([fitted], timeout=0)  # before the outcome is read, which workers write before they return
        if (outcome := monitor.outcome()) is not None:
            break
        if ended:
            raise RuntimeError(_why(fitted, job))
        if asked is None:
            try:
                check()
            except Stopped as request:
                asked = request, time.monotonic()
                run.set("stop", "")
        elif time.monotonic() - asked[1] > GRACE_S:
            logger.warning("the ranks did not answer within %.0f s; their last checkpoint counts", GRACE_S)
            raise asked[0]
        monitor.poll()
        show(monitor.facts())
        time.sleep(LOOK_S)
    match outcome.kind:
        case "refused":
            raise UserError(outcome.told)
        case "unavailable":
            raise Unavailable(outcome.told)
        case "stopped":
            raise Stopped(outcome.told)
    ray.wait([fitted], timeout=GRACE_S)  # the outcome is known; let the workers return
    return Trained(*outcome.told)


class _WorkerMonitor:
    """What the driver knows of the workers: from the store where they meet."""

    def __init__(self, job: TrainJob, run: Any, served: Any) -> None:
        self._job, self._run, self._served = job, run, served
        self._attempt, self._listener = "", None

    def outcome(self) -> Outcome | None:
        """The outcome that a worker reported; None before."""
        return Outcome(*json.loads(self._run.get("outcome"))) if self._run.check(["outcome"]) else None

    def poll(self) -> None:
        """Reads the pulse of the ranks; logs slow ranks, failures and restarts."""
        if self._listener is not None:
            self._listener.poll()
            for slow in self._listener.stragglers():
                logger.warning("%s", slow)
        if self._run.check(["failures"]):
            told = json.loads(self._run.get("failures"))
            self._run.delete_key("failures")
            who = "; ".join(f"{self._who(int(rank))} failed: {why}" for rank, why in sorted(told.items()))
            logger.warning("Ray Train starts the ranks again, from the last checkpoint (%s)", who)
        if self._run.check(["attempt"]):
            attempt, data = json.loads(self._run.get("attempt"))
            if attempt != self._attempt:
                self._attempt = attempt
                store = rendezvous.attempt_store(self._served, attempt)
                self._listener = HeartbeatMonitor(store, data * self._job.mesh.feature)
                if data < self._job.mesh.data:
                    logger.warning("training with %d data ranks of mesh.data=%d", data, self._job.mesh.data)

    def facts(self) -> dict[str, Any]:
        """The state of every rank, for status.json."""
        return {} if self._listener is None else {"ranks": self._listener.facts()}

    def _who(self, rank: int) -> str:
        return f"rank {rank}" if self._listener is None else self._listener.describe(rank)


def _begin(trainer: TorchTrainer) -> ray.ObjectRef:
    """`fit` in a process of its own on this machine.

    It returns when all is over, and a thread of this process that is in it when Ray is shut down would end the process
    at once, with exit code 1 and before it could say why.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit)
    return fit.options(scheduling_strategy=here, runtime_env={"env_vars": ENVIRONMENT}).remote(trainer)


def _fit(trainer: TorchTrainer) -> None:
    trainer.fit()


def _why(fitted: ray.ObjectRef, job: TrainJob) -> str:
    """Why Ray Train failed, in one line."""
    try:
        ray.get(fitted)
    except TrainingFailedError as failed:
        error = failed
    except RayError as other:
        return f"Ray Train ended before the training did: {first_line(getattr(other, 'cause', other))}"
    else:
        return "Ray Train ended before the training did"
    failures = getattr(error, "worker_failures", {})
    told = "; ".join(f"rank {rank}: {first_line(why)}" for rank, why in sorted(failures.items())) or first_line(error)
    return f"workers failed more than train.max_restarts={job.train.max_restarts} times; the last time: {told}"
