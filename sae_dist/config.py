"""Configuration: YAML that Hydra composed becomes frozen dataclasses that pydantic has checked.

Each dataclass lives beside the code that it configures; this file has only what all of them share.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, RootModel, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ErrorDetails

T = TypeVar("T")

_PACKAGE = Path(__file__).parent
CONF_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())  # wheel, else checkout


class UserError(ValueError):
    """What a user can cause and cure: one line that names the value, the place and the cure. Exit code 2."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C, preemption) and can go on where it stopped. Exit code 75."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose fields pydantic checks and which refuses unknown keys."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)  # type: ignore[return-value]


def load(cls: type[T], values: Mapping[str, Any]) -> T:
    """`values` as a checked `cls`; raises `UserError` naming every bad key, its value and what was expected."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise UserError("; ".join(_describe(e, values) for e in error.errors())) from None


def _describe(error: ErrorDetails, values: Mapping[str, Any]) -> str:
    key = ".".join(_keys(error["loc"], values))
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key {key}={error['input']!r}; remove it (--help lists the keys)"
        case "missing" | "missing_argument":
            return f"{key} is missing; set {key}=..."
        case "value_error":
            reason = error["msg"].removeprefix("Value error, ")
            return f"{key}: {reason}" if key else reason
        case _:
            return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(loc: tuple[int | str, ...], values: object) -> list[str]:
    """The keys of a place in `values`, without the kinds by which pydantic tells alternatives apart."""
    keys = []
    for part in loc:
        if isinstance(values, Mapping) and part not in values and values.get("kind") == part:
            continue
        keys.append(str(part))
        values = values.get(part) if isinstance(values, Mapping) else None
    return keys


def to_dict(config: object) -> dict[str, Any]:
    """A config as plain JSON-ready values; `load(type(config), to_dict(config)) == config`."""
    return RootModel[type(config)](config).model_dump(mode="json")  # type: ignore[valid-type]


def digest(values: object) -> str:
    """SHA-256 of the canonical JSON of `values`: equal contents collide, different ones never."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
