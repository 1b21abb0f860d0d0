"""Jobs of Kubernetes with KubeRay: a RayJob, which is a cluster of its own for as long as the run lasts."""

import copy
import json
import shlex
import shutil
import subprocess
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field
from ray import __version__ as ray_version

from sae_dist.config import UserError, frozen
from sae_dist.service.submit.job import Job, environment
from sae_dist.service.submit.templates import template


@frozen
class KubeRay:
    """A Kubernetes cluster with KubeRay 1.5.1 or newer, by the context of kubectl."""

    kind: Literal["kuberay"] = "kuberay"
    image: str  # with sae_dist in it: launch/Dockerfile
    namespace: str = "default"  # of Kubernetes
    nodes: Annotated[int, Field(ge=1)] = 2  # workers; the head comes beside them, without GPUs
    cpus: Annotated[int, Field(ge=1)] = 8  # of a node
    gpus: Annotated[int, Field(ge=0)] = 1  # of a worker
    memory: str = "64Gi"  # of a node
    claim: str = "sae-dist-shared"  # a volume that all nodes mount for writing
    mount: str = "/shared"  # where; out= lies there
    secret: str = "sae-dist"  # whose variables the nodes get, if it is there: S3, W&B
    tls: bool = False  # Ray's traffic between nodes encrypted, where KubeRay can
    tries: Annotated[int, Field(ge=1)] = 10  # how often it is started in all
    stop_s: Annotated[int, Field(ge=1)] = 600  # seconds that a job that is stopped has to save
    env: tuple[str, ...] = ()  # names of variables that go along; secrets belong into the secret


def manifest(job: Job, options: KubeRay) -> dict[str, Any]:
    """The RayJob."""
    if "://" not in job.out and not PurePosixPath(job.out).is_relative_to(options.mount):
        raise UserError(
            f"out={job.out} is not on the volume that the nodes see at mount={options.mount}; use "
            f"out={options.mount}/runs/{PurePosixPath(job.out).name}"
        )
    made = yaml.safe_load(template("kuberay.yaml"))
    made["metadata"] = {
        "name": job.id,
        "namespace": options.namespace,
        "labels": {"app.kubernetes.io/name": "sae-dist"},
    }
    spec, variables = made["spec"], environment(options.env) | {"RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_s)}
    spec["entrypoint"] = shlex.join(job.attempts("python", options.tries, cluster="auto"))
    spec["backoffLimit"] = options.tries - 1
    spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": variables})
    cluster = spec["rayClusterSpec"]
    cluster["rayVersion"] = ray_version
    if options.tls:
        cluster["tlsOptions"] = {"enabled": True}
    pod = cluster["headGroupSpec"]["template"]
    (container,), (volume,) = pod["spec"]["containers"], pod["spec"]["volumes"]
    container["image"] = options.image
    container["envFrom"][0]["secretRef"]["name"] = options.secret
    container["resources"]["limits"] = {"cpu": str(options.cpus), "memory": options.memory}
    container["volumeMounts"][0]["mountPath"] = options.mount
    volume["persistentVolumeClaim"]["claimName"] = options.claim
    (workers,) = cluster["workerGroupSpecs"]
    workers |= dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), options.nodes)
    workers["template"] = copy.deepcopy(pod)
    if options.gpus:
        workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = str(options.gpus)
    return made


def render(job: Job, options: KubeRay) -> str:
    """The manifest as YAML."""
    return yaml.dump(manifest(job, options), Dumper=_Plain, sort_keys=False, width=1000)


def submit(job: Job, options: KubeRay) -> int:
    """Applies the manifest, unless the job runs or has ended well; the exit code of this command."""
    given, place = render(job, options), ("--namespace", options.namespace)
    found = _kubectl("get", "rayjob", job.id, *place, "--ignore-not-found", "--output=json")
    if found.strip():
        state = json.loads(found).get("status", {}).get("jobStatus") or "PENDING"
        if state == "SUCCEEDED":
            print(f"{job.id} is done already; its results are in {job.out}")
            return 0
        if state not in ("FAILED", "STOPPED"):
            print(f"{job.id} is there already: {state.lower()}")
            return 0
        _kubectl("delete", "rayjob", job.id, *place)
    print(_kubectl("apply", *place, "--filename=-", given=given).strip())
    print(f"follow it with: kubectl logs --namespace {options.namespace} --follow --selector job-name={job.id}")
    return 0


def _kubectl(*arguments: str, given: str | None = None) -> str:
    if shutil.which("kubectl") is None:
        raise UserError(
            "there is no kubectl on this machine; install it, or use dry_run=true and give what it prints to "
            "`kubectl apply --filename=-` where there is one"
        )
    done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"kubectl {arguments[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


class _Plain(yaml.SafeDumper):
    """YAML without anchors, which people read more easily twice."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True
