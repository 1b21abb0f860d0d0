"""What the passes of a sweep may take: how many at a time, which cores and GPUs each has, how many points it holds."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch
from sae_kernels.cpu.build import library

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.plan.machine import Backend
from sae_dist.plan.memory import memory
from sae_dist.plan.workload import Workload, workload
from sae_dist.service.config import RunConfig, TrainJob
from sae_dist.service.devices import usable_gpus
from sae_dist.shards import stores
from sae_dist.shards.format import ELEMENTS
from sae_dist.shards.hooks import width
from sae_dist.sweep.config import SweepConfig

FREE = 0.9  # of the memory that is free when a sweep starts
DEAD = 0.02  # share of the latents that AuxK trains, as `plan` assumes


class Slot(NamedTuple):
    """The place of one pass; None: all that there is."""

    cores: tuple[int, ...] | None = None
    gpus: tuple[str, ...] | None = None  # as CUDA_VISIBLE_DEVICES names them


def slots(config: SweepConfig, job: TrainJob | RunConfig) -> list[Slot]:
    """Places for passes of this kind, one for each pass at a time; UserError where the budget holds none."""
    ranks, cores = job.mesh.data * job.mesh.feature, sorted(os.sched_getaffinity(0))
    there = 0 if job.train.device == "cpu" else usable_gpus()
    gpus = there if config.gpus is None else config.gpus
    if job.cluster != "local":  # its Ray places the ranks: what is to be said here is how many passes there are
        fit = gpus // ranks if config.gpus else (config.cpus or ranks) // ranks
        return [Slot()] * _at_once(config, fit, ranks)
    if gpus > there:
        raise UserError(f"sweep.gpus={gpus}, but this process can use {there}; lower it, or give a cluster=")
    if gpus:
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))
        own = names.split(",")
        jobs = _at_once(config, gpus // ranks, ranks)
        return [Slot(gpus=tuple(own[at * ranks : (at + 1) * ranks])) for at in range(jobs)]
    if (config.cpus or 0) > len(cores):
        raise UserError(f"sweep.cpus={config.cpus}, but this process may use {len(cores)}; lower it")
    cores = cores[: config.cpus]
    jobs = config.jobs or max(len(cores) // (ranks * job.train.threads), 1) if job.train.threads else config.jobs or 1
    if jobs == 1 and config.cpus is None:
        return [Slot()]
    if jobs > len(cores):
        raise UserError(f"sweep.jobs={jobs} passes at a time for {len(cores)} cores; lower it")
    share = len(cores) // jobs
    return [Slot(cores=tuple(cores[at * share : (at + 1) * share])) for at in range(jobs)]


def _at_once(config: SweepConfig, fit: int, ranks: int) -> int:
    if fit < 1:
        raise UserError(
            f"a pass takes {ranks} ranks (mesh.data x mesh.feature), which are more than sweep.gpus={config.gpus} and "
            f"sweep.cpus={config.cpus} allow; raise them, or use a smaller mesh"
        )
    return min(config.jobs or fit, fit)


class Sizes(NamedTuple):
    """What the rows of a store come to."""

    d_model: int  # of all hook points together
    sites: int  # their number
    rows: int
    stored_bytes: int
    slice_rows: int


def sizes(job: TrainJob | RunConfig, hooks: Sequence[str], store: str) -> Sizes:
    """Of the store, or before it is there of the model and the harvest that will fill it."""
    if storage.open(store).exists("store.json"):
        meta = stores.open(storage.open(store)).meta
        rows = meta.train_units * meta.unit_rows
        return Sizes(width(meta, hooks), len(hooks), rows, meta.element.stored.itemsize, meta.slice_rows)
    assert isinstance(job, RunConfig)
    from sae_dist.model.model_size import model_size  # transformers takes seconds to import

    harvest = job.harvest
    stored = ELEMENTS[harvest.dtype].stored.itemsize
    d_model = sum(model_size(job.model, hook).width for hook in hooks)
    return Sizes(d_model, len(hooks), harvest.tokens, stored, harvest.slice_rows)


class Memory(NamedTuple):
    """How much a pass may take, and what holds it."""

    bytes: float
    backend: Backend
    runtime: float  # bytes of a process before its first tensor

    def fits(self, jobs: Sequence[TrainJob | RunConfig], of: Sizes) -> bool:
        """Whether a pass of these points does, by the formula of `plan`."""
        main, *others = (_work(job, of) for job in jobs)
        work = main._replace(others=tuple(others))
        parts = [part.bytes for part in memory(work, self) if not (part.host and self.backend == "triton")]
        return sum(parts) * (1 if self.backend == "triton" else work.ranks) <= self.bytes


def _work(job: TrainJob | RunConfig, of: Sizes) -> Workload:
    (member,) = job.members
    return workload(
        job.sae, job.train, job.order, d_model=of.d_model, sites=of.sites, data=job.mesh.data,
        feature=job.mesh.feature, dead_fraction=DEAD, store_rows=of.rows, stored_bytes=of.stored_bytes,
        slice_rows=of.slice_rows, state=member.state,
    )  # fmt: skip


def measured(config: SweepConfig, places: Sequence[Slot], cluster: str) -> Memory:
    """The memory of one pass of several at a time: on a GPU of its own, or its share of this machine's."""
    runtime = float(psutil.Process().memory_info().rss)
    if cluster != "local" and config.memory_gb is None:
        raise UserError(
            f"sweep.memory_gb is null, and what a machine of cluster={cluster} has is not known here; set it to what a "
            "GPU there holds, or without GPUs to what all passes together may take of a machine"
        )
    if places[0].gpus is not None or (cluster != "local" and config.gpus):
        given = FREE * torch.cuda.mem_get_info()[0] if config.memory_gb is None else config.memory_gb * 1e9
        return Memory(given, "triton", runtime)
    given = FREE * psutil.virtual_memory().available if config.memory_gb is None else config.memory_gb * 1e9
    return Memory(given / len(places), "cpu" if library() else "torch", runtime)
