"""The files of an import as one matrix, end to end: opened by format, hashed, and checked for changes."""

import logging
import pickle
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import safetensors
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from sae_dist import config
from sae_dist.config import UserError
from sae_dist.shards.imports.arrays import of_npy, of_safetensors, of_torch
from sae_dist.shards.imports.matrix import Matrix
from sae_dist.shards.imports.parquet import of_parquet

logger = logging.getLogger(__name__)
SUFFIXES = (".npy", ".parquet", ".pt", ".pth", ".safetensors")
UNREADABLE = (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile)
UNREADABLE += (pa.ArrowException, safetensors.SafetensorError)
CHUNK_BYTES = 8 << 20
LOG_FROM_BYTES = 1 << 30  # hashing more than this is logged


class Source:
    """Matrices of one width and dtype, end to end; their files must not change while this is in use."""

    def __init__(self, path: str, key: str):
        """Opens a file, or the files of a folder in the order of their names."""
        self.path, self.files = path, _files(Path(path))
        self._stamps = [_stamp(file) for file in self.files]
        self._matrices = [_open(file, key) for file in self.files]
        first = self._matrices[0]
        for file, matrix in zip(self.files, self._matrices, strict=True):
            if (matrix.width, matrix.dtype) != (first.width, first.dtype):
                raise UserError(
                    f"path={file} is {matrix.dtype} of width {matrix.width}, {self.files[0]} is {first.dtype} of "
                    f"width {first.width}; import files that are alike"
                )
        self.width, self.dtype = first.width, first.dtype
        self.rows = sum(matrix.rows for matrix in self._matrices)
        if self.rows < 2 or self.width < 1:
            raise UserError(f"path={path} holds {self.rows} rows of width {self.width}; at least two rows are needed")

    def fingerprint(self) -> str:
        """The hash of every byte of every file and of what is read of it: two sources of one fingerprint are equal."""
        if (size := sum(size for size, *_ in self._stamps)) > LOG_FROM_BYTES:
            logger.info("hashing %.1f GB of %s: the hash becomes part of the store's name", size / 1e9, self.path)
        read = [[m.name, _hash(file)] for m, file in zip(self._matrices, self.files, strict=True)]
        return config.digest(read)[:32]

    def read(self, ranges: Sequence[tuple[int, int]]) -> Float[Tensor, "rows width"]:
        """The rows [start, stop) of each range, one range after the other."""
        parts = [part for start, stop in ranges for part in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, start: int, stop: int) -> Iterator[Tensor]:
        for file, matrix in zip(self.files, self._matrices, strict=True):
            if start < matrix.rows and stop > 0:
                with _read_errors(file):
                    yield matrix.read(max(start, 0), min(stop, matrix.rows))
            start, stop = start - matrix.rows, stop - matrix.rows

    def check_unchanged(self) -> None:
        """UserError once a file has changed since it was hashed."""
        for file, stamp in zip(self.files, self._stamps, strict=True):
            if _stamp(file) != stamp:
                raise UserError(
                    f"path={file} was changed while it was imported; leave it as it is, and import it into an empty "
                    "place (the units that are there are rows of the old file)"
                )


def _files(path: Path) -> list[Path]:
    with _read_errors(path):
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
        if not files or not path.exists():
            raise UserError(f"path={path} holds nothing to import; give a file or a folder of {', '.join(SUFFIXES)}")
        for file in files:
            if not stat.S_ISREG(file.stat().st_mode):
                raise UserError(f"path={file} is not a file (a pipe, a device or a folder); save the rows to a file")
    return files


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size, modification time and inode of a file: they change with every write."""
    with _read_errors(path):
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino


def _hash(path: Path) -> str:
    whole = xxhash.xxh3_128()
    with _read_errors(path), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
    return whole.hexdigest()


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turns errors of the file system and of libraries that read the file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"path={path} may not be read by this user; change its permissions or copy it") from None
    except UNREADABLE as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"path={path} cannot be read as {path.suffix or 'a file'} ({problem}); write it again or name another"
        ) from None


def _open(path: Path, key: str) -> Matrix:
    with _read_errors(path):
        match path.suffix:
            case ".npy":
                matrix = of_npy(path)
            case ".safetensors":
                matrix = of_safetensors(path, key)
            case ".parquet":
                matrix = of_parquet(path, key)
            case ".pt" | ".pth":
                matrix = of_torch(path, key)
            case _:
                raise UserError(f"path={path}: unknown kind of file; import one of {', '.join(SUFFIXES)}")
    if not matrix.dtype.is_floating_point:
        raise UserError(f"path={path} holds {matrix.dtype}; activations are float16, bfloat16, float32 or float64")
    return matrix
