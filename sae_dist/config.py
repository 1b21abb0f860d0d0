"""Configuration: YAML that Hydra composed becomes frozen dataclasses that pydantic has checked.

Each dataclass lives beside the code that it configures; this file has only what all of them share.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, RootModel, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ErrorDetails

T = TypeVar("T")
SHOWN = 200  # characters of a value in a message

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
        raise UserError("; ".join(_problems(error.errors(), values))) from None


def _problems(errors: Sequence[ErrorDetails], values: Mapping[str, Any]) -> list[str]:
    """One problem a place: where a value may be of several kinds, all that it may be."""
    problems: dict[str, list[str]] = {}
    for error in errors:
        place, reason = _describe(error, values)
        problems.setdefault(place, []).append(reason)
    return [f"{place}{', or '.join(dict.fromkeys(reasons))}" for place, reasons in problems.items()]


def _describe(error: ErrorDetails, values: Mapping[str, Any]) -> tuple[str, str]:
    """Where and what: the key, with its value where that helps, and the reason."""
    key, shown = ".".join(_keys(error["loc"], values)), repr(error["input"])
    shown = f"{shown[:SHOWN]}..." if len(shown) > SHOWN else shown
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key {key}={shown}; ", "remove it (--help lists the keys)"
        case "missing" | "missing_argument":
            return f"{key} is missing; ", f"set {key}=..."
        case "value_error":
            return f"{key}: " if key else "", error["msg"].removeprefix("Value error, ")
        case _:
            return f"{key}={shown}: ", f"{error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(loc: tuple[int | str, ...], values: object) -> list[str]:
    """The keys of a place in `values`, without the kinds by which pydantic tells alternatives apart."""
    keys = []
    for part in loc:
        if isinstance(values, Mapping):
            if part not in values and values.get("kind") == part:
                continue
            values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            break  # the value itself is at fault, as each of the kinds that it may be
        keys.append(str(part))
    return keys


def to_dict(config: object) -> dict[str, Any]:
    """A config as plain JSON-ready values; `load(type(config), to_dict(config)) == config`."""
    return RootModel[type(config)](config).model_dump(mode="json")  # type: ignore[valid-type]


def digest(values: object) -> str:
    """SHA-256 of the canonical JSON of `values`: equal contents collide, different ones never."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
