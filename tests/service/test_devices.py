"""Which ranks get GPUs: one each, or none for anybody; too few for what was asked is one line that says so."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_dist.cli.main import main
from sae_dist.config import UserError
from sae_dist.service.devices import (
    CPU_BUNDLE,
    GPU_BUNDLE,
    device_of_actor,
    device_of_local_rank,
    device_of_process,
)
from sae_dist.train.config import MeshConfig
from tests.train.test_loop import rows_of


def test_ranks_on_one_machine_take_the_gpus_of_their_numbers():
    assert device_of_local_rank("auto", rank=2, ranks=3, there=4) == torch.device("cuda", 2)
    assert device_of_local_rank("auto", rank=2, ranks=3, there=2) == torch.device("cpu")
    assert device_of_local_rank("cpu", rank=0, ranks=1, there=8) == torch.device("cpu")
    with pytest.raises(UserError, match="3 ranks were started on .*, which has 2 usable GPUs; start as many"):
        device_of_local_rank("cuda", rank=0, ranks=3, there=2)


def test_one_process_takes_a_gpu_that_is_there():
    assert device_of_process("auto", there=1).type == "cuda" and device_of_process("auto", there=0).type == "cpu"
    with pytest.raises(UserError, match="sees no usable GPU"):
        device_of_process("cuda", there=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_a_gpu_that_torch_cannot_use_is_one_line():
    assert device_of_actor(CPU_BUNDLE).type == "cpu"
    with pytest.raises(UserError, match="Ray gave a rank a GPU of .*; install a torch with CUDA, or use train.device"):
        device_of_actor(GPU_BUNDLE)


def test_data_ranks_follow_the_workers_and_feature_ranks_stay():
    asked = MeshConfig(data=3, feature=2, least_data=1)
    made = [asked.of_workers(workers) for workers in range(2, 8)]
    assert [(mesh.data, mesh.feature, mesh.least_data) for mesh in made] == [
        (1, 2, None), (1, 2, None), (2, 2, None), (2, 2, None), (3, 2, None), (3, 2, None)
    ]  # fmt: skip


@pytest.fixture
def imported(tmp_path) -> Path:
    """A store of made-up rows."""
    np.save(tmp_path / "rows.npy", torch.cat([rows_of(unit) for unit in range(2)]).numpy())
    assert main(["store", "import", f"path={tmp_path}/rows.npy", f"store={tmp_path}/store"]) == 0
    return tmp_path / "store"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="there are GPUs for them here")
def test_torchrun_without_gpus_says_so_in_one_line(imported, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sae_dist"]
    arguments = ["train", f"store={imported}", f"out={tmp_path}/run", "mesh.feature=2", "train.device=cuda"]
    ended = subprocess.run([*run, *arguments], env=os.environ, text=True, capture_output=True, timeout=120)
    assert ended.returncode != 0
    errors = {line for line in ended.stderr.splitlines() if line.startswith("error: ")}
    assert all("train.device=cuda, but 2 ranks were started on" in line for line in errors) and errors
