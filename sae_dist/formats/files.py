"""Reading other tools' files without running what is in them, and writing files that replace nothing."""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sae_dist.config import UserError


def inside(path: Path, *names: str) -> Path:
    """`path` itself if it is a file, else the first of these files in it; UserError where there is none."""
    if path.is_file():
        return path
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"path={path} has no {' or '.join(names)}; give the folder or the file of the dictionary")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where the file is missing or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}, which says what the weights are") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no keys")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or is damaged ({error})") from None


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file; UserError for pickled objects, which are never opened."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no npz file of plain arrays, or is damaged ({error})") from None


def read_torch(path: Path) -> dict[str, Any]:
    """The dict in a file of torch.save, tensors and plain values only; UserError for anything that would run code."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is no file of torch.save, or of a version before 1.6; save it again, or as safetensors"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not opened: it could run code"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} where a dict of tensors is due")
    return found


def take(tensors: Mapping[str, Any], *names: str, path: Path, optional: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Exactly these tensors, as fp32; UserError where one is missing, or there are others."""
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(map(str, sorted(tensors)))}")
    if other := sorted(str(name) for name in tensors.keys() - {*names, *optional}):
        raise UserError(f"{path} also has {', '.join(other)}, whose meaning is not known")
    found = {name: tensors[name] for name in (*names, *optional) if name in tensors}
    if wrong := [name for name, tensor in found.items() if not isinstance(tensor, Tensor)]:
        raise UserError(f"{path}: {wrong[0]} is no tensor")
    return {name: tensor.float() for name, tensor in found.items()}


def write_new(path: Path, data: bytes) -> Path:
    """Writes a file, whole or not at all; UserError where another is there already."""
    if path.is_file():
        if path.read_bytes() == data:
            return path
        raise UserError(f"to={path.parent} has another {path.name} already; give an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(path, data)
    return path


def replace_whole(path: Path, data: bytes) -> None:
    """Writes a file in a folder that is there, whole or not at all, in the place of what has its name."""
    path.with_name(path.name + ".part").write_bytes(data)
    path.with_name(path.name + ".part").replace(path)


def as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def as_torch(values: Mapping[str, Any]) -> bytes:
    """As torch.save writes a dict of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save({key: v.contiguous() if isinstance(v, Tensor) else v for key, v in values.items()}, buffer)
    return buffer.getvalue()
