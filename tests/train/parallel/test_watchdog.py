"""A rank whose GPU waits for a lost peer ends itself, with a line that names the peer; not for one that is done."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sae_dist.parallel.key_value import StoreAddress
from sae_dist.train.config import MeshConfig
from sae_dist.train.parallel.heartbeat import Heartbeat
from sae_dist.train.parallel.mesh_session import mesh_session
from sae_dist.train.parallel.rendezvous import Rendezvous, connect_store, serve
from tests.processes import PROCESSES

STUCK = """
import sys, time
from sae_dist.parallel.key_value import StoreAddress
from sae_dist.train.parallel.rendezvous import Rendezvous, connect_store
from sae_dist.train.parallel.heartbeat import Heartbeat
from sae_dist.train.parallel.watchdog import Watchdog

rendezvous = Rendezvous(StoreAddress("127.0.0.1", int(sys.argv[1]), sys.argv[2]), "attempt1")
Heartbeat(connect_store(rendezvous, 10), 0)
Watchdog(connect_store(rendezvous, 10), 0, 2, timeout_s=3.0)
print("watching", flush=True)
time.sleep(60)  # as one that asks a GPU for a number: nothing in this thread can be interrupted
"""


def stuck(place: StoreAddress) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(place.port), place.secret],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "watching\n"
    return process


@pytest.mark.slow
def test_a_rank_ends_with_the_name_of_the_one_that_its_gpu_waits_for():
    served = serve("127.0.0.1")
    rendezvous = Rendezvous(served.address, "attempt1")
    other = Heartbeat(connect_store(rendezvous, 10), 1)
    other.set_phase(7, "training")
    process = stuck(served.address)
    time.sleep(1.5)  # so that it hears what the other said last
    other.close()
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.search(
        r"rank 0 ends, its GPU waits for others: rank 1 \(.*\), last at step 7 \(training\) is silent", said
    )
    assert time.monotonic() - began < 3.0 + 3.0


@pytest.mark.slow
def test_a_rank_that_has_left_in_peace_is_not_missed():
    served = serve("127.0.0.1")
    other = Heartbeat(connect_store(Rendezvous(served.address, "attempt1"), 10), 1)
    process = stuck(served.address)
    other.done()
    time.sleep(6.0)
    assert process.poll() is None
    process.kill()
    process.communicate()


def offer(folder: Path, place: StoreAddress, rank: int) -> None:
    device = "cuda" if rank == 0 else "cpu"
    with mesh_session(MeshConfig(feature=2), Rendezvous(place, "a"), rank=rank, world=2, device=device) as here:
        everybody = [torch.zeros(1) for _ in range(2)]
        dist.all_gather(everybody, torch.tensor([float(rank)]))
        (folder / str(rank)).write_text(f"{here.mesh.device} {everybody[1].item():g}")


def test_ranks_of_which_one_has_no_gpu_agree_on_cpus(tmp_path):
    served = serve("127.0.0.1")
    ranks = [PROCESSES.Process(target=offer, args=(tmp_path, served.address, rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["cpu 1"] * 2
