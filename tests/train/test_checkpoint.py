"""Checkpoints are complete or absent, a damaged one is never loaded, and any cut of one is read by any other."""

import json
import os
import signal
from pathlib import Path

import pytest
import s3fs
import torch

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.storage import Storage
from sae_dist.train import checkpoint, checkpoint_manifest, retention
from sae_dist.train.checkpoint import Checkpoint, OwnedRows
from sae_dist.train.checkpoint_folders import folders as complete
from sae_dist.train.checkpoint_folders import new_folder, step_of
from sae_dist.train.checkpoint_manifest import CheckpointManifest
from sae_dist.train.parallel.mesh import Mesh
from sae_dist.train.parallel.mesh_checkpoints import Checkpoints
from sae_dist.train.retention import Retention
from sae_dist.train.saver import Saver
from tests.shards import seaweedfs
from tests.shards.s3_double import S3Double

RUN_ID = "1f2e3d4c"


def state(step: int, rows: int = 7) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "W": torch.randn(rows, 5, generator=generator),
        "b": torch.randn(rows, generator=generator),
        "silent": torch.randint(100, (rows,), generator=generator),
        "steps": torch.tensor(step),
    }
    return Checkpoint(step, tensors, {"scale": 0.1, "order_hash": 2**64 - step})


def of(place: Storage, run_id: str = RUN_ID) -> Checkpoints:
    return Checkpoints(Mesh.single(), place, run_id)


def save(place: Storage, state: Checkpoint) -> str:
    return of(place).save(state)


def latest(place: Storage) -> Checkpoint | None:
    return of(place).latest()


def prune(place: Storage, sound: list[str], keep: int, every: int = 0) -> list[CheckpointManifest]:
    return retention.prune(place, RUN_ID, Retention(keep, every), sound=sound)


def same(read: Checkpoint | None, written: Checkpoint) -> bool:
    assert read is not None
    assert (read.step, read.facts, read.tensors.keys()) == (written.step, written.facts, written.tensors.keys())
    return all(torch.equal(read.tensors[name], tensor) for name, tensor in written.tensors.items())


@pytest.fixture
def place(tmp_path) -> Storage:
    return storage.open(tmp_path)


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 48)  # two rows of W


def test_a_checkpoint_reads_back_as_written(place):
    save(place, state(3))
    assert same(latest(place), state(3))


def test_tensors_larger_than_a_file_are_cut_and_put_together(place, small_files):
    folder = save(place, state(3))
    written = checkpoint_manifest.read_manifest(place, folder)
    assert [sum(block.rows for block in file.blocks if block.name == "W") for file in written.files][:4] == [
        2,
        2,
        2,
        1,
    ]
    assert same(latest(place), state(3))


def test_an_empty_folder_has_none(tmp_path):
    assert latest(storage.open(tmp_path / "nothing")) is None


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_what_any_number_of_processes_wrote_any_other_number_reads(place, small_files, writers, readers):
    whole = state(8, rows=13)

    def shard(rank: int, world: int) -> dict[str, torch.Tensor | OwnedRows]:
        each = -(-13 // world)

        def cut_rows(t):
            return OwnedRows(t[rank * each : (rank + 1) * each], rank * each, 13)

        cut = {n: cut_rows(t) for n, t in whole.tensors.items() if t.ndim}  # pyright: ignore[reportAttributeAccessIssue]
        return cut | {"steps": whole.tensors["steps"]}

    folder, files = new_folder(8, RUN_ID), []
    for rank in range(writers):
        mine = shard(rank, writers) if rank == 0 else {n: t for n, t in shard(rank, writers).items() if n != "steps"}
        files += checkpoint.write_files(place, folder, rank, checkpoint.blocks(mine))
    layouts = {name: checkpoint.layout(tensor) for name, tensor in shard(0, writers).items()}
    checkpoint_manifest.commit(place, CheckpointManifest(folder, 8, True, whole.facts, layouts, tuple(files)))
    each = -(-13 // readers)
    for rank in range(readers):
        rows = range(rank * each, min((rank + 1) * each, 13))
        read = checkpoint.read(place, folder, lambda name, _, rows=rows: None if name == "steps" else rows)
        for name, part in shard(rank, readers).items():
            got = read.tensors[name]
            if isinstance(part, OwnedRows):
                assert isinstance(got, OwnedRows)
                assert torch.equal(got.local, part.local) and got[1:] == part[1:]
            else:
                assert torch.equal(got, part)


def test_what_would_not_be_whole_is_never_committed(place):
    half = {"W": OwnedRows(torch.zeros(3, 2), 0, 6)}
    with pytest.raises(AssertionError, match="would not be whole"):
        save(place, Checkpoint(1, half, {}))
    assert latest(place) is None


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "no tensors", "no manifest", "half a manifest", "a fact was changed", "swapped files"]
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(place, tmp_path, damage, caplog, small_files):
    older, newest = tmp_path / save(place, state(1)), tmp_path / save(place, state(2))
    tensors, manifest = newest / "rank00000-00002.safetensors", newest / "checkpoint.json"
    content = bytearray(tensors.read_bytes())
    match damage:
        case "flip":
            content[-3] ^= 1
            tensors.write_bytes(content)
        case "cut":
            tensors.write_bytes(content[:-4])
        case "no tensors":
            tensors.unlink()
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "a fact was changed":
            manifest.write_text(manifest.read_text().replace('"scale":0.1', '"scale":0.2'))
        case "swapped files":
            tensors.write_bytes((older / tensors.name).read_bytes())
    assert same(latest(place), state(1))
    assert ("does not verify" in caplog.text) == (damage != "no manifest")


@pytest.mark.parametrize("byte", range(0, 400, 37))
def test_no_flipped_byte_anywhere_is_loaded(place, tmp_path, byte):
    save(place, state(1))
    folder = tmp_path / save(place, state(2))
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        content[byte % len(content)] ^= 0x10
        path.write_bytes(content)
        assert same(latest(place), state(1))
        content[byte % len(content)] ^= 0x10
        path.write_bytes(content)
    assert same(latest(place), state(2))


POINTS = ["checkpoint.before_file", "storage.before_sync", "storage.before_rename", "checkpoint.before_commit"]


@pytest.mark.parametrize(("point", "nth"), [(point, nth) for point in POINTS[:3] for nth in (1, 3)] + [(POINTS[3], 1)])
def test_a_save_that_was_killed_leaves_nothing_that_counts(place, tmp_path, small_files, point, nth):
    save(place, state(1))
    child = os.fork()
    if child == 0:
        os.environ["SAE_DIST_FAULTS"] = json.dumps([{"point": point, "action": "kill", "nth": nth}])
        save(place, state(2))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert same(latest(place), state(1))
    prune(place, sound=[save(place, state(3))], keep=2)
    assert sorted(path.name[:13] for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_step_that_is_saved_again_has_a_folder_of_its_own(place):
    first, second = save(place, state(5)), save(place, state(5))
    assert first != second
    prune(place, sound=[first, second], keep=1)
    assert len(complete(place)) == 1


def test_pruning_keeps_the_newest_and_the_milestones_and_tells_the_newest(place):
    sound = [save(place, state(step)) for step in (1, 20, 3, 10, 15)]
    told = prune(place, sound=sound, keep=2, every=10)
    assert [one.step for one in told] == [15, 20]
    assert [step_of(folder) for folder in complete(place)] == [20, 15, 10]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_ones(place, tmp_path):
    damaged: Path = tmp_path / save(place, state(100))
    (damaged / "rank00000-00000.safetensors").write_bytes(b"")
    sound = []
    for step in (10, 20):
        sound.append(save(place, state(step)))
        prune(place, sound=sound, keep=1)
    assert same(latest(place), state(20))


@pytest.mark.parametrize(
    "name, at", [("rank00000-00000.safetensors", 2), ("checkpoint.json", 2), ("checkpoint.json", 1)]
)
def test_a_damaged_one_of_the_same_or_an_earlier_step_counts_for_nothing(place, tmp_path, name, at):
    folders = {step: save(place, state(step)) for step in (1, 2, 3)}
    path: Path = tmp_path / folders[at] / name
    path.write_bytes(path.read_bytes()[:-4])
    went_on_from = folders[1 if at == 2 else 2]
    (tmp_path / folders[3] / "checkpoint.json").unlink()
    sound = [went_on_from, save(place, state(2 if at == 2 else 3))]
    told = prune(place, sound=sound, keep=2)
    assert [one.folder for one in told] == sound
    assert complete(place) == sound[::-1]


def test_that_nothing_can_be_read_never_means_to_begin_anew(place, tmp_path, monkeypatch):
    """An older checkpoint, or none, only where bytes are proven to be others; nothing is removed."""
    folders = [save(place, state(step)) for step in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manifest, "FORMAT", checkpoint_manifest.FORMAT + 1)
        with pytest.raises(
            UserError, match=r"has format \d+, this program reads \d+; resume with the program that wrote"
        ):
            latest(place)
    with monkeypatch.context() as patch:

        def refuse(key: str, *_: object) -> bytes:
            raise PermissionError(13, "Permission denied", key)

        patch.setattr(place, "read", refuse)
        with pytest.raises(
            UserError, match="cannot be read .*Permission denied.* or remove that folder to resume from"
        ):
            latest(place)
    assert same(latest(place), state(2))
    for folder in folders:
        (tmp_path / folder / "rank00000-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 checkpoints in .* remove that folder to begin anew"):
        latest(place)
    assert len(complete(place)) == 2


def test_a_save_that_fails_leaves_no_files_and_one_that_cannot_tidy_has_not_failed(
    place, tmp_path, monkeypatch, caplog
):
    told: list[list[int]] = []
    saver = Saver(
        place, RUN_ID, Retention(1, 0), write=of(place).save,
        tell=lambda kept: told.append([kept_one.step for kept_one in kept]),
    )  # fmt: skip
    saver.save(state(1))
    saver.wait()
    assert told == [[1]]
    rule = {"point": "checkpoint.before_commit", "action": "raise", "nth": 0}
    monkeypatch.setenv("SAE_DIST_FAULTS", json.dumps([rule]))
    saver.save(state(2))
    saver.wait()
    assert told == [[1]] and [path.name[:13] for path in tmp_path.iterdir()] == ["step_00000001"]
    monkeypatch.delenv("SAE_DIST_FAULTS")
    with monkeypatch.context() as patch:

        def refuse(key: str) -> None:
            raise PermissionError(13, "Permission denied", key)

        patch.setattr(place, "delete", refuse)
        saver.finish(state(3))
    assert told == [[1]]
    assert "old files were not removed" in caplog.text and "step 3 was not saved" not in caplog.text
    assert same(latest(place), state(3))
    saver.close()


def in_s3(endpoint: str, monkeypatch) -> None:
    for name, value in {**seaweedfs.KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    place = storage.open("s3://bucket/run/checkpoints")
    sound = []
    for step in (1, 2, 3):
        sound.append(save(place, state(step)))
        prune(place, sound=sound, keep=2)
    assert same(latest(place), state(3))
    place.write(f"{complete(place)[0]}/rank00000-00001.safetensors", b"torn")
    assert same(latest(place), state(2))
    assert [step_of(folder) for folder in complete(place)] == [3, 2]


def test_s3_holds_them_through_errors_on_the_way(small_files, monkeypatch):
    with S3Double() as server:
        for action in ("500", "reset", "lost"):
            server.fail(action, share=0.05)
        in_s3(server.endpoint, monkeypatch)


@pytest.mark.slow
def test_a_real_s3_server_holds_them(small_files, monkeypatch, tmp_path):
    with seaweedfs.server(tmp_path / "server") as endpoint:
        keys = {"key": seaweedfs.KEYS["AWS_ACCESS_KEY_ID"], "secret": seaweedfs.KEYS["AWS_SECRET_ACCESS_KEY"]}
        s3fs.S3FileSystem(endpoint_url=endpoint, **keys).call_s3("create_bucket", Bucket="bucket")
        in_s3(endpoint, monkeypatch)
