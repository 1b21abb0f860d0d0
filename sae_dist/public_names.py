"""What files that are made for others call a model or a text: never a path, which has names of users and projects.

config.json of a dictionary is sent as it was hashed, so its paths are listed instead.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

LOCAL = ("/", ".", "~", "file:")  # what the path of a folder or a file begins with


def model_name(model: object) -> str:
    """A model's name as it is, `owner/name`; of a folder on a disk its last part."""
    name = str(model)
    return PurePath(name).name if name.startswith(LOCAL) or name.count("/") > 1 else name


def text_name(text: Mapping[str, Any]) -> str:
    """What `text` of a run's config.yaml reads: a dataset's name, the last part of a path, else the kind of text."""
    path = text.get("path")
    if not path:
        return str(text.get("kind"))
    return model_name(path) if text.get("kind") == "huggingface" else PurePath(path).name


def local_paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the value of every path of this machine in nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from local_paths(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value.startswith(LOCAL):
            yield f"{prefix}{key}", value
