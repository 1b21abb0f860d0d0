"""A run removes what it wrote and nothing else, and reads nothing that was not written where it lies."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from sae_dist import storage
from sae_dist.shards.records import seal, unseal
from sae_dist.storage import Storage, StorageError
from sae_dist.train import retention
from sae_dist.train.checkpoint_folders import folders
from sae_dist.train.retention import Retention
from tests.train.test_checkpoint import RUN_ID, latest, prune, same, save, state


@pytest.fixture
def place(tmp_path) -> Storage:
    return storage.open(tmp_path)


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


def test_what_others_put_there_stays(place, tmp_path):
    own = tmp_path / save(place, state(1))
    names = ("step_by_step", "step_1000", "step_00000001-good.bak", "step_00000001-1f2e3d4c-abcdef-copy")
    foreign = [put(tmp_path / name / "checkpoint.json") for name in names]
    foreign += [put(tmp_path / "step_00000009-99999999-abcdef" / "rank00000-00000.safetensors")]  # another run's
    foreign += [put(own / "notes.txt"), put(tmp_path / "step_00000009-1f2e3d4c-abcdef" / "model.safetensors")]
    copy = tmp_path / f"step_00000001-{RUN_ID}-000000"
    shutil.copytree(own, copy)
    prune(place, [save(place, state(2))], keep=1)
    retention.sweep(place, RUN_ID)
    assert all(path.read_text() == "mine" for path in foreign)
    assert (copy / "checkpoint.json").exists() and not (own / "checkpoint.json").exists()
    assert same(latest(place), state(2))


def test_no_link_leads_the_clean_up_elsewhere(place, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    kept = [put(elsewhere / name) for name in ("checkpoint.json", "rank00000-00000.safetensors", ".partial-0")]
    for name in (f"step_00000001-{RUN_ID}-abcdef", "step_00000001-abcdef"):
        (tmp_path / name).symlink_to(elsewhere)
    prune(place, [save(place, state(2))], keep=1)
    retention.sweep(place, RUN_ID)
    assert all(path.exists() for path in kept)
    with pytest.raises(StorageError, match="is a link, and what it leads to is outside this place"):
        retention.remove(place, f"step_00000001-{RUN_ID}-abcdef")
    assert all(path.exists() for path in kept)


def test_a_checkpoint_renamed_to_a_later_step_is_none(place, tmp_path, caplog):
    first, second = save(place, state(1)), save(place, state(2))
    (tmp_path / first).rename(tmp_path / first.replace("step_00000001", "step_00000009"))
    assert same(latest(place), state(2))
    assert f"it was written as {first}" in caplog.text
    prune(place, [second, save(place, state(3))], keep=1)
    assert len(list(tmp_path.glob("step_00000009-*/checkpoint.json"))) == 1


def test_each_dictionary_keeps_what_it_may_go_back_to(place):
    sound = [save(place, state(step)) for step in (1, 2, 3, 4, 5, 6)]
    fits = (lambda one: one.step <= 2, lambda one: one.step % 2 == 1)
    told = retention.prune(place, RUN_ID, Retention(1, 0, fits), sound=sound)
    assert [one.step for one in told] == [2, 5, 6]
    assert folders(place) == [sound[5], sound[4], sound[1]]


SENSELESS: list[dict[str, Any]] = [
    {"step": "x"}, {"step": -1}, {"step": 3}, {"scheduled": 7}, {"facts": []}, {"files": {}}, {"tensors": None},
    {"more": 1}, {"files": []}, {"tensors": {"W": {"dtype": "os", "shape": [7, 5]}}},
    {"tensors": {"W": {"dtype": "float32", "shape": [1 << 50, 5]}}},
]  # fmt: skip
OF_FILE: list[dict[str, Any]] = [
    {"name": "../../secret"}, {"name": "checkpoint.json"}, {"bytes": 1}, {"bytes": 1 << 60}, {"blocks": [["W", 0, 7]]},
    {"blocks": [["W", 0, 1 << 60], ["b", 0, 7], ["silent", 0, 7], ["steps", 0, 1]]}, {"blocks": [["nobody", 0, 7]]},
    {"blocks": "W"}, {"xxh3_128": None},
]  # fmt: skip


@pytest.mark.parametrize("change", [*SENSELESS, *[{"file": change} for change in OF_FILE], "[" * 100_000, '"\\ud800"'])
def test_a_senseless_manifest_gives_way_to_the_one_before(place, tmp_path, caplog, change):
    """Sealed as if a program had written it: it costs neither a traceback nor all memory."""
    save(place, state(1))
    path = tmp_path / save(place, state(2)) / "checkpoint.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        record = unseal(path.read_bytes(), "")
        del record["digest"]
        record["files"][0] |= change.get("file", {})
        path.write_bytes(seal(record | {name: value for name, value in change.items() if name != "file"}))
    assert same(latest(place), state(1))
    assert f"{path.parent} does not verify" in caplog.text
