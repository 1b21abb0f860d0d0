"""What tests of commands share: a short training that has ended."""

from pathlib import Path

import numpy as np
import pytest

from sae_dist.cli.main import main
from tests.shards.conftest import seaweed  # noqa: F401  a fixture


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """Its folder, and its command without out=."""
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "acts.npy", np.random.default_rng(0).standard_normal((2000, 16), np.float32))
    assert main(["store", "import", f"path={folder}/acts.npy", f"store={folder}/store"]) == 0
    command = ["train", f"store={folder}/store", "sae.n_latents=32", "sae.k=4", "train.steps=10", "train.batch=128",
               "train.init_rows=256", "wandb.mode=disabled"]  # fmt: skip
    assert main([*command, f"out={folder}/run"]) == 0
    return folder / "run", command
