"""Configuration: values that Hydra composed become frozen dataclasses, checked by pydantic.

Each dataclass is in the package that it configures; this file has what all of them share.
"""

import functools
import hashlib
import json
import re
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
    """An error that the user can cause and fix: one line with the value, the place and the cure. Exit code 2."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C, preemption) and can be resumed. Exit code 75."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen(cls: type[T]) -> type[T]:
    """Makes a frozen, keyword-only dataclass whose fields pydantic checks; unknown keys are errors."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)  # type: ignore[return-value]


def load(cls: type[T], values: Mapping[str, Any]) -> T:
    """`values` as a checked `cls`; UserError that names every bad key, its value and the cure."""
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        raise UserError("; ".join(_clauses(error, values))) from None


@functools.cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def shape_errors(shape: Any, values: object) -> str:
    """Which keys of `values` do not match the type `shape`, as a clause; empty if all do. Numbers must be finite."""
    try:
        TypeAdapter(shape).validate_python(values)
    except ValidationError as error:
        gone = {".".join(_keys(each["loc"], values)): each["type"] == "missing" for each in error.errors()}
        return ", ".join(f"{key or 'its content'} is {'missing' if gone[key] else 'wrong'}" for key in gone)
    return ""


def local_folder(key: str, value: str) -> str:
    """`value` if it is a local path; UserError for a URI, which would otherwise become a folder of that name."""
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", value):
        cure = "give a local or shared folder; mirror=s3://bucket/prefix keeps a copy of a run elsewhere"
        raise UserError(
            f"{key}={value} is not a folder on a disk, which a run needs for its own files; "
            f"{cure if key == 'out' else f'give a path without {found[1]}:'} "
            "(store= and train.checkpoints= may be URIs, as s3://bucket/prefix)"
        )
    return value


def _clauses(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """A clause for every bad key; the cures of a key's alternatives are joined."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in error.errors():
        key = ".".join(_keys(each["loc"], values))
        head, cure = _describe(each, key)
        cures = found.setdefault((key, head), [])
        if cure not in cures:
            cures.append(cure)
    return [head + " or ".join(cures) for (_, head), cures in found.items()]


def _describe(error: ErrorDetails, key: str) -> tuple[str, str]:
    """(what is wrong, the cure) in the user's terms; pydantic's messages are about Python."""
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key {key}={_shown(error['input'])}", "; remove it (--help lists the keys)"
        case "missing" | "missing_argument":
            return f"{key} is missing", f"; set {key}=..."
        case "value_error":
            reason = error["msg"].removeprefix("Value error, ")
            return (f"{key}: {reason}" if key else reason), ""
        case "union_tag_invalid":
            return f"{key}.kind={error['ctx']['tag']!r}", f": choose one of {error['ctx']['expected_tags']}"  # type: ignore[typeddict-item]
        case kind:
            of_limit = error.get("ctx", {})
            limits = {name: v if isinstance(v, str) else _shown(v) for name, v in of_limit.items()}
            words = next((words for start, words in _CURES.items() if kind.startswith(start)), "give another value")
            return f"{key}={_shown(error['input'])}: ", words.format_map(limits)


_CURES = {  # by the beginning of pydantic's error type; braces: its limits
    "int_": "give a whole number",
    "float_": "give a number",
    "finite_number": "give a finite number",
    "bool_": "give true or false",
    "string_type": "give text",
    "string_pattern_mismatch": "it must match {pattern}",
    "string_too_long": "give at most {max_length} characters",
    "string_too_short": "give at least {min_length} characters",
    "greater_than_equal": "give {ge} or more",
    "greater_than": "give more than {gt}",
    "less_than_equal": "give {le} or less",
    "less_than": "give less than {lt}",
    "literal_error": "give {expected}",
    "union_tag_not_found": "give it a kind",
    "none_required": "leave it null",
    "tuple_type": "give a list, [a, b]",
    "list_type": "give a list, [a, b]",
    "too_short": "give at least {min_length} of them",
    "too_long": "give at most {max_length} of them",
    "dict_type": "give keys and values, {{a: b}}",
    "mapping_type": "give keys and values, {{a: b}}",
    "dataclass_type": "give keys and values, {{a: b}}",
}


def _shown(value: object) -> str:
    """A value as in YAML, shortened if it is long."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case float():
            return f"{value:g}"
        case _:
            return text if len(text := repr(value)) <= 200 else f"{text[:200]}..."


def _keys(loc: tuple[int | str, ...], values: object) -> list[str]:
    """The keys of a location in `values`, without the tags that pydantic inserts for alternatives of a key."""
    keys = []
    for part in loc:
        if isinstance(values, Mapping) and part not in values and values.get("kind") == part:
            continue
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif not isinstance(values, list | tuple):
            break
        else:
            continue
        keys.append(str(part))
    return keys


def to_dict(config: object) -> dict[str, Any]:
    """A config as plain JSON-ready values; `load(type(config), to_dict(config)) == config`."""
    return RootModel[type(config)](config).model_dump(mode="json")  # type: ignore[valid-type]


def digest(values: object) -> str:
    """SHA-256 of the canonical JSON of `values`; names of files that are not UTF-8 may be in it."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
