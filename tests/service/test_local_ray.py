"""Ray that is started for one run: who can reach it, and what its processes do when all of them are asked to stop."""

import json
import os
import subprocess
import sys
from ipaddress import ip_address

import pytest

RUN = """
import json, os, signal, subprocess, sys
import psutil, ray  # before anything of ours has a say
from sae_dist.service.cluster import cluster

@ray.remote
class Actor:
    def pid(self):
        return os.getpid()

environment, found = dict(os.environ), {}
with cluster("local", cpus=1) as request:
    actor = Actor.remote()
    pid = ray.get(actor.pid.remote())
    found["changed"] = [name for name, value in os.environ.items() if "RAY" in name and environment.get(name) != value]
    family = psutil.Process().children(recursive=True)
    processes = [psutil.Process(), *family]
    found["listening"] = [
        (process.name(), each.laddr.ip)
        for process in processes for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
    ]
    head = ray.get_runtime_context().gcs_address
    stranger = f"from ray._raylet import GcsClient; GcsClient(address={head!r})"
    found["stranger"] = subprocess.run([sys.executable, "-c", stranger], capture_output=True, text=True).stderr
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
    found["request"] = request.made()
    found["same actor"] = ray.get(actor.pid.remote(), timeout=60) == pid
found["left"] = [process.name() for process in psutil.wait_procs(family, timeout=60)[1]]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_only_the_run_reaches_its_ray_and_a_signal_to_every_process_stops_the_driver_alone(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    listening = {ip_address(ip.removeprefix("::ffff:")) for _, ip in found["listening"]}
    assert listening and all(ip.is_loopback for ip in listening), found["listening"]
    assert "Unauthenticated" in found["stranger"]
    assert set(found["changed"]) <= {"RAY_CLIENT_MODE"}  # Ray's own
    assert not (tmp_path / ".ray").exists()  # no token lies in a file
    assert found["request"] and found["same actor"]
    assert found["left"] == []


@pytest.mark.slow
def test_nothing_is_left_of_a_ray_that_could_not_start():
    fails = """
import psutil
from ray._private import services
from sae_dist.service import local_ray

def late(*_, **__):
    print("before:", len(psutil.Process().children(recursive=True)))
    raise TimeoutError("The node timed out during startup")

services.start_raylet = late
try:
    local_ray.start(1)
except TimeoutError:
    print("after:", [process.name() for process in psutil.Process().children(recursive=True)])
"""
    said = subprocess.run([sys.executable, "-c", fails], capture_output=True, text=True, timeout=300, check=True).stdout
    before, after = said.splitlines()
    assert int(before.removeprefix("before: ")) > 0 and after == "after: []"


@pytest.mark.slow
def test_importing_the_service_changes_no_environment():
    """Nor does what it imports: other Rays would read it too, e.g. `ray start` in a child process."""
    code = (
        "import os; before = dict(os.environ); import sae_dist.service.run_job, sae_dist.service.ray_train; "
        "print(*(name for name, value in os.environ.items() if 'RAY' in name and before.get(name) != value))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"RAY_CLIENT_MODE"}
