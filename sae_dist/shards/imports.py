"""Stores from activations made elsewhere: npy, safetensors, Parquet or torch files become units, a few rows at a time.

Every row keeps where it came from: `doc` is its number in the source, `pos` and `token` are 0.
"""

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sae_dist import config
from sae_dist.config import UserError, frozen
from sae_dist.shards import format, writer
from sae_dist.shards.format import DType, StoreMeta
from sae_dist.shards.reader import Store
from sae_dist.storage import Storage

logger = logging.getLogger(__name__)
STORED: dict[torch.dtype, DType] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, pa.ArrowInvalid, safetensors.SafetensorError)
SUFFIXES = {".npy", ".safetensors", ".parquet", ".pt", ".pth"}


@frozen
class ImportConfig:
    """What to read and how to cut it up."""

    path: str  # a file, or a folder whose files are read by name, one after the other
    hook: str = "imported"  # the name under which the rows are stored
    key: str = ""  # the tensor of a file or the column of a table; may be left out where there is one only
    dtype: DType | Literal["auto"] = "auto"  # auto: 16-bit floats as they are, everything else as float32
    unit_rows: int = Field(default=0, ge=0)  # 0: 64 units, of at most 65,536 rows
    slice_rows: int = Field(default=0, ge=0)  # 0: 8 slices a unit, of at most 8,192 rows
    heldout_fraction: float = Field(default=0.05, ge=0, lt=1)  # of the units, and at least one if there are two
    max_nonfinite: float = Field(default=writer.MAX_NONFINITE, ge=0, le=1)
    model: str = "imported"  # what made the activations, for the record
    seed: int = 0


class Matrix(NamedTuple):
    """One two-dimensional array in a file; `read(start, stop)` gives rows without reading the others."""

    rows: int
    width: int
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]


def import_store(storage: Storage, settings: ImportConfig) -> Store:
    """Writes a store of all rows at `settings.path`; running it again continues where it stopped."""
    files = _files(Path(settings.path))
    matrices = [_checked(path, settings.key) for path in files]
    first = matrices[0]
    for path, matrix in zip(files, matrices, strict=True):
        if (matrix.width, matrix.dtype) != (first.width, first.dtype):
            raise UserError(
                f"path={path} is {matrix.dtype} of width {matrix.width}, {files[0]} is {first.dtype} of width "
                f"{first.width}; import files that are alike"
            )
    rows = sum(matrix.rows for matrix in matrices)
    if rows < 2 or first.width < 1:
        raise UserError(f"path={settings.path} holds {rows} rows of width {first.width}; at least two rows are needed")
    store = writer.create(storage, _meta(settings, files, rows, first))
    for unit in range(store.meta.n_units):
        if store.commit(unit) is not None:
            continue
        start = unit * store.meta.unit_rows
        stop = min(start + store.meta.unit_rows, rows)
        zeros = np.zeros(stop - start, np.uint32)
        x = _rows(matrices, start, stop)
        writer.write_unit(
            store, unit, {settings.hook: x}, doc=np.arange(start, stop), pos=zeros, token=zeros,
            max_nonfinite=settings.max_nonfinite,
        )  # fmt: skip
        logger.info("unit %d of %d: rows %d to %d", unit + 1, store.meta.n_units, start, stop)
    return store


def _meta(settings: ImportConfig, files: list[Path], rows: int, first: Matrix) -> StoreMeta:
    unit_rows = settings.unit_rows or min(65_536, max(-(-rows // 64), min(1024, -(-rows // 4))))
    units = -(-rows // unit_rows)
    heldout = min(max(round(settings.heldout_fraction * units), 1), units - 1) if settings.heldout_fraction else 0
    return StoreMeta(
        model=settings.model,
        hooks={settings.hook: first.width},
        n_units=units,
        unit_rows=unit_rows,
        heldout_units=heldout,
        slice_rows=settings.slice_rows or min(8192, -(-unit_rows // 8)),
        dtype=STORED.get(first.dtype, "float32") if settings.dtype == "auto" else settings.dtype,
        text_fingerprint=config.digest([_fingerprint(path) for path in files])[:32],
        seed=settings.seed,
        extra={"imported_rows": str(rows), "imported_from": ", ".join(path.name for path in files[:8])},
    )


def _files(path: Path) -> list[Path]:
    try:
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
    except PermissionError:
        raise UserError(f"path={path} may not be read by this user; change its permissions or copy it") from None
    if not files or not path.exists():
        raise UserError(
            f"path={path} holds nothing to import; give a file or a folder of {', '.join(sorted(SUFFIXES))}"
        )
    return files


def _fingerprint(path: Path) -> list[Any]:
    """Name, size, and the hash of both ends: cheap, and enough to tell that a file was replaced."""
    size, edge = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        head = file.read(edge)
        file.seek(max(size - edge, 0))
        return [path.name, size, format.xxh3_128(head), format.xxh3_128(file.read(edge))]


def _checked(path: Path, key: str) -> Matrix:
    """The matrix in a file; whatever a library finds wrong with the file becomes one line."""
    try:
        matrix = _open(path, key)
    except PermissionError:
        raise UserError(f"path={path} may not be read by this user; change its permissions or copy it") from None
    except UNREADABLE as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"path={path} cannot be read as {path.suffix} ({problem}); write it again or name another"
        ) from None
    if not matrix.dtype.is_floating_point:
        raise UserError(f"path={path} holds {matrix.dtype}; activations are float16, bfloat16, float32 or float64")
    return matrix


def _open(path: Path, key: str) -> Matrix:
    match path.suffix:
        case ".npy":
            return _of_npy(path)
        case ".safetensors":
            return _of_safetensors(path, key)
        case ".parquet":
            return _of_parquet(path, key)
        case ".pt" | ".pth":
            return _of_torch(path, key)
        case _:
            raise UserError(f"path={path}: unknown kind of file; import one of {', '.join(sorted(SUFFIXES))}")


def _of_npy(path: Path) -> Matrix:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles, never unzips
    except ValueError as error:
        raise UserError(f"path={path} is not an array of numbers ({error}); save it with numpy.save") from None
    if array.dtype.kind != "f":
        raise UserError(f"path={path} holds {array.dtype}; activations are float16, float32 or float64")
    rows, width = _shape(path, array.shape)
    dtype = torch.from_numpy(np.empty(0, array.dtype.newbyteorder("="))).dtype
    flat = array if array.ndim == 2 else array.reshape(rows, width)  # a reshape may copy, so only where it is needed
    return Matrix(
        rows, width, dtype, lambda a, b: torch.from_numpy(np.array(flat[a:b], dtype=array.dtype.newbyteorder("=")))
    )


def _of_safetensors(path: Path, key: str) -> Matrix:
    file = safetensors.safe_open(path, framework="pt")
    names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) >= 2]  # noqa: SIM118 - not a dict
    part = file.get_slice(_chosen(path, key, names))
    rows, width = _shape(path, part.get_shape())
    if len(part.get_shape()) != 2:
        raise UserError(f"path={path}: a tensor of shape {part.get_shape()}; give it two dimensions, [rows, width]")
    return Matrix(rows, width, part[0:1].dtype, lambda a, b: part[a:b])


def _of_torch(path: Path, key: str) -> Matrix:
    content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    if not isinstance(content, Tensor | dict):
        raise UserError(f"path={path} holds a {type(content).__name__}; save a tensor, or tensors by name")
    if isinstance(content, dict):
        names = [name for name, value in content.items() if isinstance(value, Tensor) and value.ndim >= 2]
        content = content[_chosen(path, key, names)]
    if not content.is_floating_point():
        raise UserError(f"path={path} holds {content.dtype}; activations are floating point")
    rows, width = _shape(path, content.shape)
    flat = content.reshape(rows, width)
    return Matrix(rows, width, content.dtype, lambda a, b: flat[a:b].clone())


def _of_parquet(path: Path, key: str) -> Matrix:
    table = pq.ParquetFile(path)
    lists = [f.name for f in table.schema_arrow if pa.types.is_list(f.type) or pa.types.is_fixed_size_list(f.type)]
    column = _chosen(path, key, lists)
    sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def group(i: int) -> Float[Tensor, "rows width"]:
        values = table.read_row_group(i, columns=[column])[column].combine_chunks()
        lengths = (
            np.unique(np.diff(values.offsets.to_numpy())) if pa.types.is_list(values.type) else [values.type.list_size]
        )
        flat = values.flatten().to_numpy(zero_copy_only=False)
        if values.null_count or len(lengths) != 1 or flat.dtype.kind != "f":
            raise UserError(f"path={path} column {column}: rows are not lists of floats of one length; cast the column")
        return torch.from_numpy(np.array(flat)).reshape(len(values), -1)

    def read(start: int, stop: int) -> Float[Tensor, "rows width"]:
        groups = range(int(np.searchsorted(starts, start, "right")) - 1, int(np.searchsorted(starts, stop, "left")))
        parts = [group(i)[max(start - starts[i], 0) : stop - starts[i]] for i in groups]
        return torch.cat(parts)

    if table.metadata.num_rows == 0:
        raise UserError(f"path={path} has no rows")
    sample = read(0, 1)
    return Matrix(table.metadata.num_rows, sample.shape[1], sample.dtype, read)


def _shape(path: Path, shape: Any) -> tuple[int, int]:
    """[..., width] as (rows, width): batch and position are both rows."""
    if len(shape) < 2:
        raise UserError(f"path={path}: an array of shape {list(shape)}; give it two dimensions, [rows, width]")
    return int(np.prod(shape[:-1])), int(shape[-1])


def _chosen(path: Path, key: str, names: list[str]) -> str:
    if key in names:
        return key
    if key == "" and len(names) == 1:
        return names[0]
    raise UserError(f"key={key!r} in path={path}: choose one of {', '.join(names) or 'nothing (it holds no matrix)'}")


def _rows(matrices: list[Matrix], start: int, stop: int) -> Float[Tensor, "rows width"]:
    """Rows [start, stop) of all matrices end to end."""
    parts = list(_parts(matrices, start, stop))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(matrices: list[Matrix], start: int, stop: int) -> Iterator[Tensor]:
    for matrix in matrices:
        if start < matrix.rows and stop > 0:
            yield matrix.read(max(start, 0), min(stop, matrix.rows))
        start, stop = start - matrix.rows, stop - matrix.rows
