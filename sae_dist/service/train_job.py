"""The train command: trains on a store in this process or on a mesh, evaluates, and writes the summary."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from sae_dist import storage
from sae_dist.config import Stopped, UserError
from sae_dist.evaluate.config import EvaluateConfig
from sae_dist.evaluate.heldout_rows import evaluate_reconstruction
from sae_dist.evaluate.metrics import UNMEASURED, merged
from sae_dist.run_files import write_json
from sae_dist.sae import dictionary
from sae_dist.service.config import TrainJob, config_hash
from sae_dist.service.devices import device_of_local_rank, device_of_process, usable_gpus
from sae_dist.service.display import Display, progress
from sae_dist.service.gpu_shares import share_gpus
from sae_dist.service.monitoring import monitored, tell_result
from sae_dist.service.rank_session import check_heldout, chosen_hooks, run_rank, wait_for_heldout
from sae_dist.service.run_folder import RunFolder
from sae_dist.service.summary import read_finished, summarize
from sae_dist.shards import stores
from sae_dist.train.config import Launcher
from sae_dist.train.loop import Trained
from sae_dist.train.parallel.collectives import broadcast_number
from sae_dist.train.parallel.heartbeat import START_S
from sae_dist.train.parallel.mesh_session import MeshSession, mesh_session
from sae_dist.train.parallel.rendezvous import torchrun_rendezvous
from sae_dist.train.warm_start import check_starts

logger = logging.getLogger(__name__)
Stop = Callable[[], bool]
Show = Callable[[Mapping[str, Any]], None]  # facts for status.json, besides those of metrics.jsonl


class Work(Protocol):
    """The training itself; calls `show` repeatedly with facts for status.json."""

    def __call__(self, *, provenance: Mapping[str, Any], show: Show) -> Trained: ...


def train_and_evaluate(job: TrainJob, *, stop: Stop) -> dict[str, Any] | None:
    """Trains, evaluates on the store's held-out units, and returns the summary (summary.json).

    Of processes that torchrun started, the first one does; the others train and return None.
    """
    job = job.with_absolute_paths()
    match launcher(job):
        case "process":
            with mesh_session(job.mesh, None, rank=0, world=1, device=_alone(job)) as alone:
                return _run_once(job, in_process(job, alone, stop), stop)
        case "torchrun":
            return _of_torchrun(job, stop)
        case "ray_train":
            return _run_once(job, in_ray_train(job, stop), stop)
        case _:
            return _run_once(job, in_actors(job, stop), stop)


def launcher(job: TrainJob) -> Launcher:
    """The launcher to use, with `auto` resolved; UserError when the one asked for is impossible."""
    asked, world, started = job.train.launcher, job.mesh.data * job.mesh.feature, "TORCHELASTIC_RUN_ID" in os.environ
    if job.mesh.least_data is not None and asked != "ray_train":
        raise UserError(
            f"mesh.least_data={job.mesh.least_data} with train.launcher={asked}: only ray_train continues with "
            "fewer ranks than mesh.data; use train.launcher=ray_train, or mesh.least_data=null"
        )
    if asked == "auto":
        return "torchrun" if started else "process" if world == 1 else "actors"
    if asked == "process" and world > 1:
        raise UserError(
            f"train.launcher=process, but mesh.data={job.mesh.data} x mesh.feature={job.mesh.feature} are {world} "
            "processes; use auto or actors"
        )
    if asked == "torchrun" and not started:
        raise UserError(
            "train.launcher=torchrun, but torchrun did not start this process; use `torchrun --standalone "
            f"--nproc-per-node {world} -m sae_dist train ...`, or train.launcher=actors"
        )
    return asked


def in_process(job: TrainJob, rank: MeshSession, stop: Stop) -> Work:
    """Training as one rank of an existing mesh."""

    def work(*, provenance: Mapping[str, Any], show: Show) -> Trained:
        return run_rank(job, rank, provenance=provenance, stop=stop, watch=lambda *_: show({}))

    return work


def in_actors(job: TrainJob, stop: Stop) -> Work:
    """Training in Ray actors, one a rank."""

    def work(*, provenance: Mapping[str, Any], show: Show) -> Trained:
        from sae_dist.service.cluster import check_capacity, cluster, nodes  # Ray, which other launchers do without
        from sae_dist.service.rank_actors import RankActors

        world = job.mesh.data * job.mesh.feature
        with cluster(job.cluster, cpus=world) as request:
            bundle = share_gpus(nodes(), mesh=job.mesh, device=job.train.device).rank
            check_capacity(bundle, world, cure="lower mesh.data or mesh.feature")
            if stop():  # while Ray started
                raise Stopped("asked to stop")
            with RankActors(job, provenance=provenance, bundle=bundle) as ranks:
                while (trained := ranks.poll(0.5)) is None:
                    request.check()
                    show(ranks.facts())
                return trained

    return work


def in_ray_train(job: TrainJob, stop: Stop) -> Work:
    """Training in the workers of Ray Train, which restarts them when some fail."""

    def work(*, provenance: Mapping[str, Any], show: Show) -> Trained:
        from sae_dist.service.cluster import check_capacity, cluster, nodes
        from sae_dist.service.ray_train import train_with_ray_train

        least = dataclasses.replace(job.mesh, data=job.mesh.least_data or job.mesh.data)
        with cluster(job.cluster, cpus=job.mesh.data * job.mesh.feature) as request:
            bundle = share_gpus(nodes(), mesh=least, device=job.train.device).rank
            check_capacity(bundle, least.data * least.feature, cure="lower mesh.data or mesh.feature")

            def check() -> None:
                request.check()
                if stop():  # while Ray started
                    raise Stopped("asked to stop")

            return train_with_ray_train(job, provenance=provenance, bundle=bundle, check=check, show=show)

    return work


def _alone(job: TrainJob) -> torch.device:
    return device_of_process(job.train.device, there=usable_gpus())


def _of_torchrun(job: TrainJob, stop: Stop) -> dict[str, Any] | None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here, together = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = (
        device_of_local_rank(job.train.device, rank=here, ranks=together, there=usable_gpus())
        if world > 1
        else _alone(job)
    )
    with (
        torchrun_rendezvous(Path(job.out), START_S) as place,
        mesh_session(job.mesh, place, rank=rank, world=world, device=device) as rank,
    ):
        work = in_process(job, rank, stop)
        if rank.mesh.is_rank_0:
            return _run_once(job, work, stop, begin=lambda go: broadcast_number(rank.mesh, go, name="begin"))
        logging.getLogger().setLevel(logging.WARNING)
        if broadcast_number(rank.mesh, 0, name="begin"):
            work(provenance={}, show=lambda _: None)
        return None


def _run_once(
    job: TrainJob, work: Work, stop: Stop, *, begin: Callable[[bool], object] = lambda _: None
) -> dict[str, Any]:
    """Does once, in rank 0: folder, evaluation, summary. Always calls `begin` with whether there is training to do."""
    begun, out = False, Path(job.out)
    try:
        store = stores.open(storage.open(job.store))
        hooks = chosen_hooks(store, job)
        hashed = config_hash(job, store.meta.digest)
        folder = RunFolder(out, job)
        with folder.recording_outcome():
            if (finished := read_finished(out, hashed, job.members)) is not None:
                folder.done(finished)
                return finished
            check_starts(job.members, job.train.checkpoints or out / "checkpoints")
            folder.status("preparing")
            if not job.live:
                check_heldout(store)
            elif job.order.round_units == 0:
                logger.warning("order.round_units=0: training begins when the whole store is there; 16 begins sooner")
            with Display(str(out)) as display, monitored(job, config_hash=hashed):

                def show(more: Mapping[str, Any], *, now: bool = False) -> None:
                    facts = progress(out, job.train)
                    display.update("train", facts, now=now)
                    folder.status("running", train=facts, **more)

                begun = True
                begin(True)
                show({})
                trained = work(provenance={"config_hash": hashed}, show=show)
                show({}, now=True)
                wait_for_heldout(store, stop)
                folder.status("evaluate")
                dictionaries = [dictionary.load(member.folder(out)) for member in job.members]
                found = evaluate_reconstruction(dictionaries, store, hooks, EvaluateConfig())
                figures = {member.name: merged(UNMEASURED, own) for member, own in zip(job.members, found, strict=True)}
                tell_result(job, figures, store=store, tokens=trained.tokens)
                summary = summarize(job, hooks=hooks, store=store, trained=trained, hashed=hashed, figures=figures)
            summary["wall_seconds"] = folder.wall_seconds
            write_json(out / "summary.json", summary)
            folder.done(summary)
            return summary
    finally:
        if not begun:
            begin(False)
