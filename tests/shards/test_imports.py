"""Activations made elsewhere become a store whose rows are the rows of the file, bit for bit."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards import reader
from sae_dist.shards.imports import ImportConfig, import_store

ROWS, WIDTH = 1003, 5


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def save(path, x: torch.Tensor) -> None:
    match path.suffix:
        case ".npy":
            np.save(path, x.numpy())
        case ".safetensors":
            safetensors.torch.save_file({"x": x, "bias": torch.ones(3)}, path)
        case ".pt":
            torch.save({"x": x, "note": torch.ones(2)}, path)
        case ".parquet":
            column = pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), WIDTH)
            pq.write_table(pa.table({"x": column, "n": range(len(x))}), path, row_group_size=100)


def rows_of(store) -> torch.Tensor:
    """All rows of a store, put back in the order of the source."""
    parts = [r for unit in range(store.meta.n_units) for r in reader.unit_rows(store, "imported", unit, 64)]
    doc = torch.from_numpy(np.concatenate([r.doc for r in parts]).astype(np.int64))
    assert sorted(doc.tolist()) == list(range(len(doc)))
    return torch.cat([r.x for r in parts])[torch.argsort(doc)]


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".npy", torch.float32),
        (".npy", torch.float16),
        (".safetensors", torch.bfloat16),
        (".safetensors", torch.float32),
        (".pt", torch.bfloat16),
        (".parquet", torch.float32),
    ],
)
def test_every_row_comes_back_bit_for_bit(tmp_path, suffix, dtype):
    save(tmp_path / f"x{suffix}", matrix(dtype))
    store = import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / f"x{suffix}")))
    assert torch.equal(rows_of(store), matrix(dtype)) and rows_of(store).dtype == dtype
    assert store.meta.heldout_units >= 1 and store.meta.n_units >= 4
    assert len(list(reader.heldout(store, "imported", 10_000))) > 0


def test_a_folder_is_read_by_name_and_cut_across_files(tmp_path):
    (tmp_path / "in").mkdir()
    for name, part in zip(("c", "a", "b"), matrix().split([3, 500, 500]), strict=True):
        np.save(tmp_path / "in" / f"{name}.npy", part.numpy())
    store = import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / "in"), unit_rows=70))
    c, a, b = matrix().split([3, 500, 500])
    assert torch.equal(rows_of(store), torch.cat([a, b, c]))


def test_more_axes_are_rows_and_other_orders_of_memory_are_read(tmp_path):
    x = np.asfortranarray(matrix()[:1000].numpy().reshape(50, 20, WIDTH))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.asfortranarray(matrix().numpy().astype(">f4")))
    for name, expected in (("x", matrix()[:1000]), ("y", matrix())):
        store = import_store(storage.open(tmp_path / f"store-{name}"), ImportConfig(path=str(tmp_path / f"{name}.npy")))
        assert torch.equal(rows_of(store), expected)


def test_parquet_lists_of_any_kind_across_row_groups(tmp_path):
    pq.write_table(pa.table({"x": matrix().tolist()}), tmp_path / "x.parquet", row_group_size=77)
    store = import_store(
        storage.open(tmp_path / "s"), ImportConfig(path=str(tmp_path / "x.parquet"), unit_rows=100, dtype="float32")
    )
    assert torch.equal(rows_of(store), matrix())


def test_importing_again_continues_and_a_changed_file_is_noticed(tmp_path):
    np.save(tmp_path / "x.npy", matrix().numpy())
    place, settings = storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / "x.npy"))
    first = import_store(place, settings).committed()
    place.delete("commit/00000002.json")
    again = import_store(place, settings).committed()
    assert {u for u in first if first[u] != again[u]} == {2}
    np.save(tmp_path / "x.npy", matrix().numpy() + 1)
    with pytest.raises(UserError, match="text_fingerprint"):
        import_store(place, settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", np.arange(12).reshape(3, 4), "holds int64; activations are float16"),
        ("x.npy", np.ones(7, np.float32), "give it two dimensions"),
        ("x.npy", np.array([{"a": 1}]), "not an array of numbers"),
        ("x.npy", np.ones((1, 4), np.float32), "at least two rows"),
        ("x.npy", np.full((40, 4), np.nan, np.float32), "with a NaN, an infinity"),
        ("x.csv", None, "unknown kind of file"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, name, content, message):
    if content is None:
        (tmp_path / name).write_text("1,2")
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / name)))


def test_a_refused_import_goes_on_once_more_bad_rows_are_allowed(tmp_path):
    x = matrix().numpy()
    x[-1, 0] = np.inf  # in the last unit only
    np.save(tmp_path / "x.npy", x)
    place = storage.open(tmp_path / "store")
    with pytest.raises(UserError, match="max_nonfinite=0"):
        import_store(place, ImportConfig(path=str(tmp_path / "x.npy"), max_nonfinite=0))
    before = {entry.key for entry in place.list("data/")}
    store = import_store(place, ImportConfig(path=str(tmp_path / "x.npy"), max_nonfinite=1))
    assert before < {entry.key for entry in place.list("data/")}  # the good units were not written again
    assert sum(commit.rows for commit in store.committed().values()) == len(x) - 1


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.parquet", "x.pt"])
@pytest.mark.parametrize("content", [b"", b"no", b"\x80\x04cos\nsystem\n.", b"PK\x03\x04" + bytes(300)])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"path={tmp_path / name} (cannot be read as|is not an array)"):
        import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / name)))


def test_files_of_other_things_than_activations_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    safetensors.torch.save_file({"a": torch.arange(60).view(-1, 3)}, tmp_path / "ints.safetensors")
    for name, message in (("list.pt", "holds a list"), ("ints.safetensors", "holds torch.int64")):
        with pytest.raises(UserError, match=message):
            import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / name)))


def test_a_choice_between_tensors_is_asked_for(tmp_path):
    safetensors.torch.save_file({"a": matrix(), "b": matrix()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="choose one of a, b"):
        import_store(storage.open(tmp_path / "s"), ImportConfig(path=str(tmp_path / "x.safetensors")))
    store = import_store(storage.open(tmp_path / "s"), ImportConfig(path=str(tmp_path / "x.safetensors"), key="b"))
    assert store.committed()
    with pytest.raises(UserError, match="holds nothing to import"):
        import_store(storage.open(tmp_path / "s"), ImportConfig(path=str(tmp_path / "nowhere")))
