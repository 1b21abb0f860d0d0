"""No key is ignored: each reaches the configuration, is read by the product, and stands in --help with its default."""

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic.fields import FieldInfo

from sae_dist.cli import keys
from sae_dist.cli.compose import compose, help_text
from sae_dist.config import UserError, load, to_dict
from sae_dist.sae.config import KINDS

ROOT = Path(__file__).parents[2]
NEEDED = {
    "run": [], "harvest": ["store=s"], "train": ["store=s"], "evaluate": ["out=o"], "pages": ["out=o"],
    "label": ["run=r"],
}  # fmt: skip
CONFIGS = {command: importlib.import_module(f"sae_dist.cli.{command}").CONFIG for command in NEEDED}


def leaves(config: type, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value, by its path, in a configuration and in all alternatives of its keys."""
    for name, field in keys._fields(config):
        nested = [field.annotation, *get_args(field.annotation)]
        nested = [kind for kind in nested if dataclasses.is_dataclass(kind)]
        for kind in nested:
            yield from leaves(kind, f"{prefix}{name}.")
        if not nested:
            yield f"{prefix}{name}", field


def others(hint: Any, value: Any) -> Iterator[Any]:
    """Values that the key might take instead."""
    yield from (choice for kind in (hint, *get_args(hint)) for choice in get_args(kind) if isinstance(choice, str))
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value / 2, 1)
    yield from ("another", 2, 0.5, ["another"], [{"seed": 7}], None)


def flips(command: str) -> Iterator[tuple[dict[str, Any], str, FieldInfo]]:
    """Each key once, with the composed values of a choice of alternatives that has it."""
    alternatives = [
        [f"{key}={name}"] for key, found in keys.groups(CONFIGS[command]).items() for name in found if len(found) > 1
    ]
    seen: set[str] = set()
    there = dict(leaves(CONFIGS[command]))
    for chosen in [[], *alternatives]:
        values = compose(command, [*NEEDED[command], *chosen])
        for path in leaf_paths(values):
            if path not in seen and path.rpartition(".")[2] != "kind":
                seen.add(path)
                yield values, path, there[path]


def leaf_paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaf_paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return values | {key: changed(values[key], rest, value) if rest else value}


def get(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


@pytest.mark.parametrize("command", CONFIGS)
def test_every_key_changes_the_configuration_or_is_refused(command):
    for values, path, field in flips(command):
        before = to_dict(load(CONFIGS[command], values))
        ignored = []
        for other in others(field.annotation, get(values, path)):
            if other == get(values, path):
                continue
            try:
                after = to_dict(load(CONFIGS[command], changed(values, path, other)))
            except UserError:
                continue
            if get(after, path) != get(before, path):
                break
            ignored.append(other)
        else:
            assert not ignored, path


@pytest.mark.parametrize("command", CONFIGS)
def test_every_key_may_be_given_on_the_command_line_and_stands_in_the_help(command):
    values = compose(command, NEEDED[command])
    listed = yaml.safe_load(help_text(command, "").split("makes of them):")[1])
    paths = list(leaf_paths(values))
    assert paths == list(leaf_paths(listed))
    given = compose(command, [*NEEDED[command], *(f"{path}=given" for path in paths)])
    assert {path: get(given, path) for path in paths} == dict.fromkeys(paths, "given")


def test_every_key_is_read_somewhere():
    """By the name of the attribute: what no line reads cannot have an effect."""
    read: set[str] = set()
    for path in [*(ROOT / "sae_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    fields = {path.rpartition(".")[2] for config in CONFIGS.values() for path, _ in leaves(config)}
    assert fields - read == {"trust_remote_code"}  # only false is accepted, so there is nothing to read


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_a_kind_inherits_keeps_its_comment(kind):
    beside = keys.comments(KINDS[kind])
    assert "no AuxK" in beside["k_aux"] and "silent" in beside["dead_after_tokens"]
    if "l1_fraction" in KINDS[kind].__dataclass_fields__:
        assert "rises from 0" in beside["l1_fraction"]
