"""Matrices in npy, safetensors and torch files: mapped into memory, rows are copied out as they are asked for."""

from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards.imports.matrix import Matrix, chosen, shape


def of_npy(path: Path) -> Matrix:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles, never unzips
    except ValueError as error:
        raise UserError(f"path={path} is not an array of numbers ({error}); save it with numpy.save") from None
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise UserError(f"path={path} holds {array.dtype}; activations are float16, float32 or float64")
    rows, width = shape(path, array.shape)
    native = array.dtype.newbyteorder("=")
    dtype = torch.from_numpy(np.empty(0, native)).dtype
    flat = array if array.ndim == 2 else array.reshape(rows, width)  # a reshape may copy, so only where it is needed
    return Matrix("", rows, width, dtype, lambda a, b: torch.from_numpy(np.array(flat[a:b], dtype=native)))


def of_safetensors(path: Path, key: str) -> Matrix:
    file = safetensors.safe_open(path, framework="pt")
    names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) >= 2]  # noqa: SIM118 - not a dict
    name = chosen(path, key, names)
    part = file.get_slice(name)
    rows, width = shape(path, part.get_shape())
    if len(part.get_shape()) != 2:
        raise UserError(f"path={path}: a tensor of shape {part.get_shape()}; give it two dimensions, [rows, width]")
    return Matrix(name, rows, width, part[0:1].dtype, lambda a, b: part[a:b])


def of_torch(path: Path, key: str) -> Matrix:
    name, content = "", torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    if not isinstance(content, Tensor | dict):
        raise UserError(f"path={path} holds a {type(content).__name__}; save a tensor, or tensors by name")
    if isinstance(content, dict):
        names = [name for name, value in content.items() if isinstance(value, Tensor) and value.ndim >= 2]
        name = chosen(path, key, names)
        content = content[name]
    if not content.is_floating_point():
        raise UserError(f"path={path} holds {content.dtype}; activations are floating point")
    rows, width = shape(path, content.shape)
    flat = content.reshape(rows, width)
    return Matrix(name, rows, width, content.dtype, lambda a, b: flat[a:b].clone())
