"""The schedulers that a job can be given to, by the key `scheduler`."""

from typing import Annotated, assert_never

from pydantic import Field

from sae_dist.service.submit import kuberay, ray_jobs, skypilot, slurm, torchrun
from sae_dist.service.submit.job import Job
from sae_dist.service.submit.kuberay import KubeRay
from sae_dist.service.submit.ray_jobs import RayJobs
from sae_dist.service.submit.skypilot import SkyPilot
from sae_dist.service.submit.slurm import Slurm
from sae_dist.service.submit.torchrun import Torchrun

Scheduler = Annotated[RayJobs | Slurm | KubeRay | SkyPilot | Torchrun, Field(discriminator="kind")]


def render(job: Job, scheduler: Scheduler) -> str:
    """What would be sent, as text; UserError where the two do not fit."""
    match scheduler:
        case RayJobs():
            return ray_jobs.render(job, scheduler)
        case Slurm():
            return slurm.render(job, scheduler)
        case KubeRay():
            return kuberay.render(job, scheduler)
        case SkyPilot():
            return skypilot.render(job, scheduler)
        case Torchrun():
            return torchrun.render(job, scheduler)
        case _:
            assert_never(scheduler)


def submit(job: Job, scheduler: Scheduler) -> int:
    """Sends the job, unless it is there or done already; the exit code of the command that did it."""
    match scheduler:
        case RayJobs():
            return ray_jobs.submit(job, scheduler)
        case Slurm():
            return slurm.submit(job, scheduler)
        case KubeRay():
            return kuberay.submit(job, scheduler)
        case SkyPilot():
            return skypilot.submit(job, scheduler)
        case Torchrun():
            return torchrun.submit(job, scheduler)
        case _:
            assert_never(scheduler)
