"""Jobs of SkyPilot: a managed job on machines of a cloud, spot or not; lost machines are replaced."""

import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from sae_dist.config import UserError, frozen
from sae_dist.service.submit.job import Job, environment
from sae_dist.service.submit.templates import template

# Ray over the job's machines, apart from the Ray that SkyPilot itself runs on them; the first machine has the command.
ON_NODES = """\
head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
  until ray start --address="$head:26379" --block; do sleep 5; done
  exit 0
fi
ray start --head --port=26379 --node-ip-address="$head" --include-dashboard=false
"""


# What has to be created exactly once, and so cannot lie on the mounted bucket: rclone has no hard links there.
CREATED_ONCE = {
    "run": ("store", "train.checkpoints"),
    "harvest": ("store",),
    "train": ("store", "train.checkpoints"),
}


@frozen
class SkyPilot:
    """Machines of a cloud by SkyPilot 0.11 or newer."""

    kind: Literal["skypilot"] = "skypilot"
    infra: str | None = None  # aws, gcp/us-central1, k8s; null: the cheapest
    nodes: Annotated[int, Field(ge=1)] = 1  # machines
    gpus: str | None = "H100:8"  # of a node; null: none
    cpus: str | None = None  # of a node: 16+
    memory: str | None = None  # of a node, in GB: 64+
    image: str | None = None  # docker:...; null: SkyPilot's own
    spot: bool = True  # machines that the cloud may take away, and that cost less
    bucket: str  # that is mounted on every node, and keeps the run: s3://bucket/folder
    mount: str = "/shared"  # where; out= lies there
    setup: str  # shell that installs the program, once a machine: pip install git+https://HOST/REPOSITORY
    tries: Annotated[int, Field(ge=1)] = 10  # how often a run that dies is started in all; preemptions do not count
    env: tuple[str, ...] = ()  # names of variables that go along
    secrets: tuple[str, ...] = ()  # names of variables that SkyPilot takes from here and keeps to itself


def task(job: Job, options: SkyPilot) -> dict[str, Any]:
    """The job's YAML, as values."""
    if "://" not in job.out and not PurePosixPath(job.out).is_relative_to(options.mount):
        raise UserError(
            f"out={job.out} is not in the bucket that the nodes see at mount={options.mount}; use "
            f"out={options.mount}/runs/{PurePosixPath(job.out).name}"
        )
    if options.nodes > 1 and not job.joins_cluster:
        raise UserError(f"nodes={options.nodes}: {job.command} works on one node; use nodes=1")
    _refuse_the_mount(job, options)
    made = yaml.safe_load(template("skypilot.yaml"))
    made |= {"name": job.id, "num_nodes": options.nodes, "setup": options.setup}
    asked = {
        "infra": options.infra, "accelerators": options.gpus, "cpus": options.cpus, "memory": options.memory,
        "image_id": options.image, "use_spot": options.spot,
    }  # fmt: skip
    recovery = made["resources"]["job_recovery"] | {"max_restarts_on_errors": options.tries - 1}
    made["resources"] = {k: v for k, v in asked.items() if v is not None} | {"job_recovery": recovery}
    (mounted,) = made["file_mounts"].values()
    made["file_mounts"] = {options.mount: mounted | {"source": options.bucket}}
    made["envs"] |= environment(options.env)
    several = options.nodes > 1
    if several:  # Ray runs code for whoever reaches its ports; the token comes along as one of SkyPilot's secrets
        made["envs"]["RAY_AUTH_MODE"] = "token"
        made["secrets"] = {"RAY_AUTH_TOKEN": None}
    # A run that dies is tried again by SkyPilot, on machines that are whole.
    words = job.attempts("python", 1, cluster="auto" if several else None)
    made["run"] = f"{ON_NODES if several else ''}{shlex.join(words)}\n"
    return made


def _refuse_the_mount(job: Job, options: SkyPilot) -> None:
    """UserError for what would lie on the mounted bucket and cannot."""
    without = f"the bucket at mount={options.mount} has no hard links"
    if job.command == "sweep":
        raise UserError(
            f"scheduler=skypilot runs no sweep: its ledger lies in out=, and {without}, by which one driver alone "
            "takes a point; use another scheduler=, or submit its points one by one"
        )
    for key in CREATED_ONCE.get(job.command, ()):
        section, _, last = key.rpartition(".")
        place = (job.values[section] if section else job.values)[last]
        if not str(place).startswith("s3://"):
            raise UserError(
                f"{key}={'null' if place is None else place}: {without}, so nothing can be created exactly once there; "
                f"set {key}=s3://BUCKET/FOLDER"
            )


def render(job: Job, options: SkyPilot) -> str:
    return yaml.safe_dump(task(job, options), sort_keys=False, width=1000)


def submit(job: Job, options: SkyPilot) -> int:
    """Launches the managed job by the `sky` command; its exit code."""
    rendered = render(job, options)
    if shutil.which("sky") is None:
        raise UserError(
            "there is no sky on this machine; `pip install skypilot`, or use dry_run=true and give what it prints to "
            "`sky jobs launch` where there is one"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix=f"{job.id}-") as file:
        file.write(rendered)
        file.flush()
        names = (*options.secrets, *(["RAY_AUTH_TOKEN"] if options.nodes > 1 else []))
        given = [word for name in names for word in ("--secret", name)]  # the values stay in the environment
        command = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.id, *given, file.name]
        return subprocess.run(command, env=os.environ | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}).returncode
