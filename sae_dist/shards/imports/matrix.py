"""One matrix of activations in a file, whatever the file's format."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_dist.config import UserError


class Matrix(NamedTuple):
    """Rows of one width; `read(start, stop)` reads only those rows, fastest in ascending order."""

    name: str  # of the tensor or column that was chosen; "" where the file has no names
    rows: int
    width: int
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]


def shape(path: Path, shape: Sequence[int]) -> tuple[int, int]:
    """[..., width] as (rows, width): batch and position are both rows."""
    if len(shape) < 2:
        raise UserError(f"path={path}: an array of shape {list(shape)}; give it two dimensions, [rows, width]")
    return int(np.prod(shape[:-1])), int(shape[-1])


def chosen(path: Path, key: str, names: Sequence[str]) -> str:
    """The name that `key` means; the only one where it is empty."""
    if key in names:
        return key
    if key == "" and len(names) == 1:
        return names[0]
    raise UserError(f"key={key!r} in path={path}: choose one of {', '.join(names) or 'nothing (it holds no matrix)'}")
