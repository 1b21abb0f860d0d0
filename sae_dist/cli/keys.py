"""The keys of a command as its dataclasses declare them: defaults, alternatives, and the comments beside them.

A default stands once, in the dataclass beside the code that uses it; conf/ holds what differs.
"""

import ast
import dataclasses
import functools
import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from hydra.core.config_store import ConfigStore
from pydantic import RootModel
from pydantic.fields import FieldInfo

from sae_dist.config import CONF_DIR

MISSING = "???"  # Hydra's word for a value that must be given


@functools.lru_cache(maxsize=1)  # all commands share the name: only the last one's need not be registered again
def register(config: type) -> None:
    """Registers the defaults with Hydra: all under the name `keys`, each alternative in the group of its key.

    An alternative with a file in conf/ is not registered.
    """
    store = ConfigStore.instance()
    store.store(name="keys", node=defaults(config))
    for key, alternatives in groups(config).items():
        for name, alternative in alternatives.items():
            if not (CONF_DIR / key / f"{name}.yaml").exists():
                store.store(group=key, name=name, node=defaults(alternative))


def defaults(config: type) -> dict[str, Any]:
    """Every key with its default, nested; without keys that have alternatives, which are groups."""
    found: dict[str, Any] = {}
    for name, field in _fields(config):
        if dataclasses.is_dataclass(field.annotation):
            found[name] = defaults(field.annotation)  # pyright: ignore[reportArgumentType]
        elif not _alternatives(field):
            found[name] = MISSING if field.is_required() else RootModel[Any](field.default).model_dump(mode="json")
    return found


def groups(config: type) -> dict[str, dict[str, type]]:
    """The keys that have alternatives, each with its alternatives by name."""
    found = {name: _alternatives(field) for name, field in _fields(config)}
    return {name: alternatives for name, alternatives in found.items() if alternatives}


def comments(config: type, prefix: str = "") -> dict[str, str]:
    """What is said of every key by its dotted path: the comment beside it in the source, and the words it may be."""
    inherited = [base for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]  # itself comes last
    beside = {name: text for base in inherited for name, text in _beside(base).items()}
    found = {f"{prefix}{name}": text for name, text in beside.items()}
    for name, field in _fields(config):
        words, said = _words(field.annotation), beside.get(name, "")
        if name != "kind" and any(word not in said for word in words):
            found[f"{prefix}{name}"] = "; ".join(filter(None, [said, ", ".join(words)]))
        if dataclasses.is_dataclass(field.annotation):
            found |= comments(field.annotation, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
    return found


def comments_of_yaml(text: str, prefix: str = "") -> dict[str, str]:
    """The comment beside every key of a YAML file, by dotted path; a comment line belongs to the key above it."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        code, _, comment = line.partition("#")
        if key := code.partition(":")[0].strip():
            indent = len(code) - len(code.lstrip())
            path = [(at, name) for at, name in path if at < indent] + [(indent, key)]
        dotted = prefix + ".".join(name for _, name in path)
        if comment and (key or dotted in found):
            found[dotted] = " ".join(filter(None, [found.get(dotted), comment.strip()]))
    return found


def _fields(config: type) -> Iterator[tuple[str, FieldInfo]]:
    yield from config.__pydantic_fields__.items()  # pyright: ignore[reportAttributeAccessIssue]


def _words(annotation: object) -> list[str]:
    """All strings that a key may be, or that its list may hold; none where it may be any string."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    return [word for inner in get_args(annotation) for word in _words(inner)]


def _alternatives(field: FieldInfo) -> dict[str, type]:
    """The dataclasses that a key may be, by `kind`; `default` names the only one of a key that may be null."""
    options = [option for option in get_args(field.annotation) if dataclasses.is_dataclass(option)]
    if len(options) == 1:
        return {"default": options[0]}  # pyright: ignore[reportReturnType]
    return {dict(_fields(option))["kind"].default: option for option in options}  # pyright: ignore[reportArgumentType,reportReturnType]


@functools.cache  # commands share their dataclasses
def _beside(config: type) -> dict[str, str]:
    """The comments of a dataclass's own fields: on their lines, or on lines of their own right above."""
    source = inspect.getsource(config)
    words = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {word.start[0]: word.string.lstrip("# ") for word in words if word.type == tokenize.COMMENT}
    found = {}
    (declared,) = ast.parse(source).body
    for field in declared.body if isinstance(declared, ast.ClassDef) else ():
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            first, last = field.lineno, field.end_lineno or field.lineno
            text = source.splitlines()
            while first - 1 in lines and text[first - 2].lstrip().startswith("#"):
                first -= 1
            if said := [lines[number] for number in range(first, last + 1) if number in lines]:
                found[field.target.id] = " ".join(said)
    return found
