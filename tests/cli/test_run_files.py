"""What a finished run left, damaged: whoever reads it says so in one line, and the run's own command makes it again."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from sae_dist.cli.main import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """A short training that has ended: its folder, and its command without out=."""
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "acts.npy", np.random.default_rng(0).standard_normal((2000, 16), np.float32))
    assert main(["store", "import", f"path={folder}/acts.npy", f"store={folder}/store"]) == 0
    command = ["train", f"store={folder}/store", "sae.n_latents=32", "sae.k=4", "train.steps=10", "train.batch=128",
               "train.init_rows=256", "wandb.mode=disabled"]  # fmt: skip
    assert main([*command, f"out={folder}/run"]) == 0
    return folder / "run", command


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copy")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["dictionary.safetensors", "config.json"])
def test_a_damaged_dictionary_is_not_judged_and_is_made_again(finished, copy, capsys, caplog, name, damage):
    whole = (finished[0] / "dictionary" / name).read_bytes()
    damage(copy / "dictionary" / name)
    assert main(["evaluate", str(copy)]) == 2
    assert name in capsys.readouterr().err
    assert main([*finished[1], f"out={copy}"]) == 0
    assert name in caplog.text
    assert (copy / "dictionary" / name).read_bytes() == whole
