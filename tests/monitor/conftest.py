"""What tests of tracking share: a small store, and patience with trackers where processors are busy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_dist.cli.main import main
from sae_dist.monitor import tracker_process
from tests.train.test_loop import rows_of


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("rows")
    np.save(place / "rows.npy", torch.cat([rows_of(unit) for unit in range(8)]).numpy())
    assert main(["store", "import", f"path={place}/rows.npy", f"store={place}/store", "heldout_fraction=0.1"]) == 0
    return place / "store"


@pytest.fixture(scope="session", autouse=True)
def patient() -> None:
    """A run waits for its trackers to take what is left, however long that takes."""
    tracker_process.CLOSE_S = 240.0
