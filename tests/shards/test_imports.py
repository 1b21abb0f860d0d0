"""Activations made elsewhere become a store whose rows are the rows of the file, bit for bit."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.shards import reader
from sae_dist.shards.hooks import Hooks
from sae_dist.shards.imports import ImportConfig, import_store
from sae_dist.shards.imports.sources import Source
from sae_dist.shards.imports.unit_plan import ImportPlan, row_numbers
from sae_dist.shards.loader import Loader

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


def parquet_columns() -> dict[str, pa.Array]:
    """`matrix()[:1000]` as the libraries write it; some put several rows into a cell."""
    flat, cells = pa.array(matrix()[:1000].flatten().numpy()), matrix()[:1000].view(-1, 4, WIDTH)
    return {
        "list": pa.array(matrix()[:1000].tolist(), pa.list_(pa.float32())),
        "large_list": pa.array(matrix()[:1000].tolist(), pa.large_list(pa.float32())),  # polars
        "fixed_size_list": pa.FixedSizeListArray.from_arrays(flat, WIDTH),
        "array_2d": pa.array(cells.tolist(), pa.list_(pa.list_(pa.float32()))),  # datasets
        "array_of_arrays": pa.array(cells.tolist(), pa.list_(pa.list_(pa.float32(), WIDTH), 4)),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(cells.numpy()),
        "a.name.with.dots": pa.array(matrix()[:1000].tolist(), pa.list_(pa.float32())),
    }


@pytest.mark.parametrize("name", parquet_columns())
def test_parquet_columns_of_any_kind_of_list_across_row_groups(tmp_path, name):
    column = parquet_columns()[name]
    table = pa.table({name: column, "n": range(len(column))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1 + len(column) // 13)
    store = import_store(storage.open(tmp_path / "s"), ImportConfig(path=str(tmp_path / "x.parquet"), unit_rows=100))
    assert torch.equal(rows_of(store), matrix()[:1000])


def test_a_parquet_row_group_is_not_read_again_for_every_unit(tmp_path):
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    x = np.random.default_rng(0).standard_normal((20_000, 16), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 16)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": column}), path)
    before = bytes_read()
    store = import_store(storage.open(tmp_path / "s"), ImportConfig(path=str(path), unit_rows=500))
    assert store.meta.n_units == 40
    assert bytes_read() - before < 6 * path.stat().st_size  # hash, sample, training rows, held-out rows


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1.0, 2], [3]]), "lists of different lengths"),
        (pa.array([[1.0, 2], None]), "lists of different lengths, or nulls"),
        (pa.array([[1.0, 2], [3, None]]), "1 nulls"),
        (pa.array([[1, 2], [3, 4]]), "int64"),
    ],
)
def test_parquet_cells_that_are_no_rows_are_named(tmp_path, column, message):
    pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet", row_group_size=1)
    with pytest.raises(UserError, match=f"column x holds .*(arrays of shape|{message})"):
        import_store(storage.open(tmp_path / "s"), ImportConfig(path=str(tmp_path / "x.parquet")))


@pytest.mark.parametrize(("rows", "heldout"), [(40, 8), (3000, 150), (10_241, 512), (100_000, 5000)])
def test_held_out_rows_are_a_sample_of_the_whole_source(rows, heldout):
    plan = ImportPlan(rows, unit_rows=0, heldout_fraction=0.05, seed=1)
    units = [row_numbers(plan.ranges(unit)) for unit in range(plan.units)]
    assert np.array_equal(np.sort(np.concatenate(units)), np.arange(rows))
    held = np.concatenate(units[plan.train_units :])
    assert len(held) == heldout
    assert max(map(len, units)) <= plan.unit_rows
    if heldout >= 64:
        eighths = np.bincount(8 * held // rows, minlength=8)
        assert eighths.min() > 0.6 * heldout / 8 and eighths.max() < 1.4 * heldout / 8
    other = ImportPlan(rows, unit_rows=0, heldout_fraction=0.05, seed=2)
    assert rows == 40 or other.ranges(plan.units - 1) != plan.ranges(plan.units - 1)
    assert ImportPlan(rows, unit_rows=0, heldout_fraction=0, seed=1).heldout_units == 0


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


def test_a_file_that_was_edited_anywhere_is_another_source(tmp_path):
    x = np.random.default_rng(0).standard_normal((40_000, 16), np.float32)  # 2.5 MB
    np.save(tmp_path / "x.npy", x)
    place, settings = storage.open(tmp_path / "store"), ImportConfig(path=str(tmp_path / "x.npy"))
    import_store(place, settings)
    x[20_000] *= -1
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UserError, match="text_fingerprint"):
        import_store(place, settings)


def test_another_tensor_of_the_file_is_another_source(tmp_path):
    safetensors.torch.save_file({"a": matrix(), "b": matrix() + 1}, tmp_path / "x.safetensors")
    place = storage.open(tmp_path / "store")
    import_store(place, ImportConfig(path=str(tmp_path / "x.safetensors"), key="a"))
    with pytest.raises(UserError, match="text_fingerprint"):
        import_store(place, ImportConfig(path=str(tmp_path / "x.safetensors"), key="b"))


def test_a_file_that_changes_while_it_is_imported_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", matrix().numpy())
    source = Source(str(tmp_path / "x.npy"), "")
    source.fingerprint()
    source.check_unchanged()
    np.save(tmp_path / "x.npy", matrix().numpy() + 1)
    with pytest.raises(UserError, match=r"x\.npy was changed while it was imported"):
        source.check_unchanged()


@pytest.mark.parametrize("where", [slice(None, None, 100), slice(300, 349)])  # spread, and a unit of nothing else
def test_rows_far_longer_than_the_others_are_left_out_and_counted(tmp_path, where, caplog):
    x = matrix().numpy()
    x[where] *= 3000
    np.save(tmp_path / "x.npy", x)
    path = str(tmp_path / "x.npy")
    store = import_store(storage.open(tmp_path / "s"), ImportConfig(path=path, unit_rows=25))
    n = len(x[where])
    assert f"{n} rows are longer than max_norm_ratio=10 times the median norm" in caplog.text
    commits = store.committed().values()
    assert (sum(c.rows for c in commits), sum(c.dropped for c in commits)) == (len(x) - n, n)
    assert store.statistics("imported").max_abs < 100
    with Loader(store, hooks=Hooks(("imported",)), batch=32, seed=0) as loader:
        assert max(float(next(loader).x.abs().max()) for _ in range(30)) < 100
    kept = import_store(storage.open(tmp_path / "all"), ImportConfig(path=path, max_norm_ratio=None))
    assert sum(c.rows for c in kept.committed().values()) == len(x)


def test_a_source_with_many_long_rows_is_refused_before_anything_is_written(tmp_path):
    x = matrix().numpy()
    x[::10] *= 3000
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UserError, match="101 of 1003 sampled rows are longer than max_norm_ratio=10 times the median"):
        import_store(storage.open(tmp_path / "s"), ImportConfig(path=str(tmp_path / "x.npy")))
    assert not (tmp_path / "s").exists()


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


def test_what_is_found_wrong_only_while_rows_are_read_is_one_line_too(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": matrix().tolist()}), path, row_group_size=500, compression="gzip")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 2000] = bytes(2000)  # in the second row group
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.parquet cannot be read as \.parquet"):
        import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(path)))


def test_a_named_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    for path in (tmp_path / "x.npy", tmp_path):
        with pytest.raises(UserError, match=r"x\.npy is not a file \(a pipe"):
            import_store(storage.open(tmp_path / "store"), ImportConfig(path=str(path)))


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
