"""The jobs that were submitted to a Ray cluster or to Slurm: list them, follow one, stop one.

A job that is stopped saves first, and goes on when it is submitted again. Ctrl-C while following leaves it running.
Example: sae-dist jobs address=http://127.0.0.1:8265
"""

import shutil
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sae_dist.config import UserError, frozen, load
from sae_dist.service.submit import ray_jobs, slurm


@frozen
class Jobs:
    """Where, and what to do."""

    address: str | None = None  # of a Ray cluster's dashboard: http://HEAD:8265; null: Slurm, by its commands
    follow: str | None = None  # a job: show its log until it ends
    stop: str | None = None  # a job: it saves and ends

    def __post_init__(self) -> None:
        if self.address is not None:
            ray_jobs.check_address(self.address)
        if self.follow is not None and self.stop is not None:
            raise ValueError(f"follow={self.follow} and stop={self.stop}: give one of them")


CONFIG = Jobs


def main(values: Mapping[str, Any]) -> int:
    jobs = load(Jobs, values)
    if jobs.address is None and shutil.which("squeue") is None:
        raise UserError(
            "there is no Slurm on this machine; set address= to a Ray cluster's dashboard, http://HEAD:8265"
        )
    if jobs.stop is not None:
        if jobs.address is None:
            slurm.stop(jobs.stop)
        else:
            ray_jobs.stop(jobs.address, jobs.stop)
        return 0
    if jobs.follow is not None:
        return slurm.follow(jobs.follow) if jobs.address is None else ray_jobs.follow(jobs.address, jobs.follow)
    _show(jobs.address)
    return 0


def _show(address: str | None) -> None:
    table = Table(show_edge=False)
    for heading in ("job", "state", "out"):
        table.add_column(heading, overflow="fold")
    if address is None:
        for found in slurm.queued():
            table.add_row(f"{found.number} {found.id}", f"{found.state.lower()} {found.elapsed}", found.out)
    else:
        for found in ray_jobs.listed(address):
            table.add_row(found.id, found.state, found.out)
    if table.row_count:
        Console().print(table)
    else:
        print(f"no jobs of sae-dist in {address or 'the queue'}")
