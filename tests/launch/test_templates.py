"""The launch files, as far as a machine without a cluster can tell: they parse, and the commands in them compose."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

from sae_dist.cli.compose import compose
from sae_dist.config import load
from sae_dist.service.config import RunConfig

LAUNCH = Path(__file__).parents[2] / "launch"


def run_keys(text: str) -> list[str]:
    """The key=value words of the `sae-dist run` command in a file."""
    joined = re.sub(r"\\\n\s*", " ", text)
    command = next(line for line in joined.splitlines() if "sae-dist run" in line and "=" in line)
    words = shlex.split(command.partition("sae-dist run")[2], comments=True)
    return [word.replace("$address", "10.0.0.1:6379") for word in words if "=" in word]


def kuberay() -> dict:
    return yaml.safe_load((LAUNCH / "kuberay.yaml").read_text())


@pytest.mark.parametrize(
    "text", [(LAUNCH / "slurm.sbatch").read_text(), "sae-dist run " + kuberay()["spec"]["entrypoint"]]
)
def test_the_command_of_a_template_is_one_that_this_version_understands(text):
    config = load(RunConfig, compose("run", run_keys(text)))
    assert config.cluster != "local"
    assert config.store_uri.startswith("s3://")


def test_the_slurm_script_is_valid_shell():
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=True)


def test_the_slurm_script_asks_again_when_the_run_was_stopped(tmp_path):
    """Run for real between stand-ins of Slurm's three commands: exit code 75 leads to one requeue, 0 and 1 to none."""
    script = (LAUNCH / "slurm.sbatch").read_text()
    for name, body in {
        "srun": f'printenv RAY_AUTH_MODE RAY_AUTH_TOKEN >> {tmp_path}/token; exit "$RUN_ENDS_WITH"',
        "python": f'exec {sys.executable} "$@"',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    for code, requeued in ((0, ""), (1, ""), (75, "requeue 7\n")):
        done = subprocess.run(["bash"], input=script, text=True, env=environment | {"RUN_ENDS_WITH": str(code)})
        assert done.returncode == code
        told = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
        assert told == requeued
    tokens = (tmp_path / "token").read_text().splitlines()
    assert tokens[::2] == ["token"] * 3 and all(len(token) == 64 for token in tokens[1::2])
    assert len(set(tokens[1::2])) == 3  # each job has its own


def test_the_kubernetes_job_has_the_shape_and_the_version_of_ray_that_is_installed():
    job = kuberay()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}
    assert {"groupName", "replicas", "minReplicas", "maxReplicas"} <= set(cluster["workerGroupSpecs"][0])


def test_the_image_copies_what_the_package_is_built_from():
    copied = re.findall(r"^COPY (.+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "README.md", "sae_dist", "kernels", "conf"} <= names
    assert all((LAUNCH.parent / name).exists() for name in names)
