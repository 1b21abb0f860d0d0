"""Checkpoints are complete or absent, and a damaged one is never loaded."""

import json

import pytest
import torch

from sae_dist.train import checkpoint
from sae_dist.train.checkpoint import Checkpoint


def state(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(step, {"W": torch.randn(7, 5, generator=generator)}, {"scale": 0.5, "order_hash": 2**64 - step})


def test_a_checkpoint_reads_back_as_written(tmp_path):
    checkpoint.save(tmp_path, state(3))
    read = checkpoint.latest(tmp_path)
    assert read is not None
    assert (read.step, read.facts) == (3, state(3).facts)
    assert torch.equal(read.tensors["W"], state(3).tensors["W"])


def test_an_empty_folder_has_none(tmp_path):
    assert checkpoint.latest(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "half a manifest", "no tensors"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage, caplog):
    checkpoint.save(tmp_path, state(1))
    newest = checkpoint.save(tmp_path, state(2))
    tensors, manifest = newest / "state.safetensors", newest / "checkpoint.json"
    content = bytearray(tensors.read_bytes())
    match damage:
        case "flip":
            content[-3] ^= 1
            tensors.write_bytes(content)
        case "cut":
            tensors.write_bytes(content[:-4])
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "no tensors":
            tensors.unlink()
    read = checkpoint.latest(tmp_path)
    assert read is not None
    assert read.step == 1
    assert "step_00000002 does not verify" in caplog.text


def test_a_save_that_was_killed_leaves_nothing_that_counts(tmp_path):
    killed = tmp_path / ".step_00000009.123"
    killed.mkdir(parents=True)
    (killed / "state.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, state(1))
    checkpoint.prune(tmp_path, 1, newest=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001"]


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    checkpoint.save(tmp_path, state(5))
    changed = state(5)._replace(facts={"scale": 0.25})
    folder = checkpoint.save(tmp_path, changed)
    assert json.loads((folder / "checkpoint.json").read_text())["facts"] == {"scale": 0.25}


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 20, 3):
        checkpoint.save(tmp_path, state(step))
    checkpoint.prune(tmp_path, 2, newest=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000020"]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_ones(tmp_path):
    damaged = checkpoint.save(tmp_path, state(100))
    (damaged / "state.safetensors").write_bytes(b"")
    for step in (10, 20):
        checkpoint.save(tmp_path, state(step))
        checkpoint.prune(tmp_path, 1, newest=step)
    read = checkpoint.latest(tmp_path)
    assert read is not None
    assert read.step == 20
