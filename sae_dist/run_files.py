"""A run's small JSON and YAML files: written atomically, and checked when they are read."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from sae_dist.config import UserError, shape_errors
from sae_dist.system_errors import naming_file

T = TypeVar("T")


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming_file(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_whole` of JSON; ValueError for numbers that are not finite."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, shape: type[T], *, cure: str) -> T:
    """The JSON file `path`, checked as the TypedDict `shape`; UserError with the cure when it does not match."""
    return parse_json(_text(path, cure), shape, name=str(path), cure=cure)


def parse_json(text: str | bytes, shape: type[T], *, name: str, cure: str) -> T:
    """`read_json` of a text that was read already, from the file `name`."""
    try:
        values = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is damaged: it is not whole JSON; {cure}") from None
    if wrong := shape_errors(shape, values):
        raise UserError(f"{name} is damaged: {wrong}; {cure}")
    return values


def read_yaml(path: Path, *, cure: str) -> dict[str, Any]:
    """The YAML mapping in `path`; UserError with the cure when it is anything else."""
    return parse_yaml(_text(path, cure), name=str(path), cure=cure)


def parse_yaml(text: str | bytes, *, name: str, cure: str) -> dict[str, Any]:
    """`read_yaml` of a text that was read already, from the file `name`."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{name} is damaged: it is not whole YAML; {cure}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{name} is damaged: it does not hold keys and values; {cure}")
    return values


def _text(path: Path, cure: str) -> str:
    if not path.is_file():  # a folder, a pipe, or nothing
        raise UserError(f"{path} is {'no regular file' if path.exists() else 'missing'}; {cure}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not text; {cure}") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
