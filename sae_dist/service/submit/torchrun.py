"""Training under torchrun: on this machine, or on several where the same command is given on each."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import UserError, frozen
from sae_dist.exit_codes import BAD_INPUT, DONE, STOPPED
from sae_dist.service.run_folder import read_status
from sae_dist.service.submit.job import Job

EXIT_CODES = {"done": DONE, "refused": BAD_INPUT, "stopped": STOPPED}  # torchrun's own is 1 for all but the first


@frozen
class Torchrun:
    """Processes of torchrun: no Ray. Of `train` alone."""

    kind: Literal["torchrun"] = "torchrun"
    nodes: Annotated[int, Field(ge=1)] = 1  # machines
    address: str | None = None  # of several nodes: HOST:PORT of one of them, where they meet
    python: str | None = None  # null: the one that runs this


def words(job: Job, options: Torchrun) -> list[str]:
    """The command of one node."""
    if job.command != "train":
        raise UserError(f"scheduler=torchrun runs train alone, not {job.command}; use another scheduler=")
    mesh = job.values["mesh"]
    world = mesh["data"] * mesh["feature"]
    if world % options.nodes:
        raise UserError(
            f"mesh.data={mesh['data']} x mesh.feature={mesh['feature']} are {world} processes, which are not shared "
            f"evenly by nodes={options.nodes}; change one of them"
        )
    if options.nodes == 1:
        meet = ["--standalone"]
    elif options.address is None:
        raise UserError(f"nodes={options.nodes} need to meet: set address=HOST:PORT, of one of them, with a free port")
    else:
        meet = [
            f"--nnodes={options.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={options.address}",
            f"--rdzv-id={job.id}",
        ]
    processes = f"--nproc-per-node={world // options.nodes}"
    torchrun = [options.python or sys.executable, "-m", "torch.distributed.run", *meet, processes]
    return [*torchrun, "-m", "sae_dist", *job.line()]


def render(job: Job, options: Torchrun) -> str:
    return shlex.join(words(job, options))


def submit(job: Job, options: Torchrun) -> int:
    """Runs this node's part to its end; the exit code of the command."""
    code = subprocess.run(words(job, options)).returncode
    if code == DONE or (status := read_status(Path(job.out))) is None:
        return code
    return EXIT_CODES.get(status["state"], code)
