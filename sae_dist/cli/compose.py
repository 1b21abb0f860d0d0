"""The command line: Hydra composes conf/COMMAND.yaml with the overrides; a mistake is one line that holds the cure."""

import difflib
import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_dist.cli import keys
from sae_dist.config import CONF_DIR, UserError
from sae_dist.text.detect import detect

COLUMN = 26  # where comments begin in --help
PATH_KEYS = ("out", "run", "store", "path", "to", "follow", "stop", "prompt")  # always text: a place, a job, a prompt
QUOTED = re.compile(r"(['\"])(?:\\.|(?!\1)[^\\])*\1", re.DOTALL)  # one quoted value, and nothing else


def options(group: str, config: type | None = None) -> list[str]:
    """The alternatives of a group: the YAML files in conf/<group>/ and the dataclasses that `config` has for it."""
    declared = {} if config is None else keys.groups(config).get(group, {})
    return sorted({path.stem for path in (CONF_DIR / group).glob("*.yaml")} | set(declared))


def compose(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """conf/`command`.yaml with the overrides, resolved, as plain values; UserError for what does not compose."""
    _prepare(command)
    groups, config_class = _groups(command), _config(command)
    expanded = [
        _parsable(part)
        for override in overrides
        for part in (_expand(override, config_class) if override.partition("=")[0] in groups else [override])
    ]
    plain = {  # `model=` of a command that has no such group is a name
        part: key
        for part in expanded
        if (key := part.partition("=")[0]) not in groups and options(key, config_class) and key in _bare(command)
    }
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = hydra.compose(command, [part for part in expanded if part not in plain])
        for part, key in plain.items():
            OmegaConf.update(config, key, OverridesParser.create().parse_override(part).value())
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(command, str(error))) from None
    assert isinstance(values, dict)
    missing = [key for key, value in _leaves(values) if value == "???"]
    if missing:
        raise UserError(f"{missing[0]} is missing; set {missing[0]}=...")
    left_out = [part[1:] for part in expanded if part.startswith("~")]  # a preset may have put keys of it back
    return {str(key): None if key in left_out else value for key, value in values.items()}


def spelled_out(command: str, words: Sequence[str]) -> list[str]:
    """The words of a command line as key=value: the first of them may leave out their keys, where a command says so.

    Or all of them are values of one key, a list.
    """
    module = importlib.import_module(f"sae_dist.cli.{command}")
    positional, listed = iter(getattr(module, "POSITIONAL", ())), getattr(module, "LISTED", None)
    overrides, values = [], list[str]()
    for word in words:
        if listed is not None and "=" not in word and not word.startswith(("+", "~", "-")):
            values.append(quoted(word))
            continue
        if "=" not in word and not word.startswith(("+", "~")):
            key = next(positional, None)
            if word.startswith("-") or key is None:
                raise UserError(
                    f"{word} is not understood; write key=value (`sae-dist {command} --help` lists the keys)"
                )
            word = f"{key}={quoted(word)}"
        overrides.append(word)
    return [f"{listed}=[{','.join(values)}]", *overrides] if values else overrides


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, Mapping) else [(path, value)]
    return found


def _groups(command: str) -> dict[str, str]:
    """The groups of a command, each with its default alternative."""
    config = OmegaConf.load(CONF_DIR / f"{command}.yaml")
    assert isinstance(config, DictConfig)
    found: dict[str, str] = {}
    for entry in config.get("defaults", []):
        if isinstance(entry, DictConfig):
            found |= {str(group): chosen for group, chosen in entry.items()}
        elif (CONF_DIR / f"{entry}.yaml").is_file():  # a command that takes the keys of another
            found |= _groups(entry)
    return found


def _parsable(override: str) -> str:
    """The override as Hydra parses it: a name or a path with characters of Hydra's grammar is quoted."""
    key, equals, value = override.partition("=")
    as_it_is, as_text = [override], [f"{key}={quoted(value)}"]
    if not equals or value == "null":
        tries = as_it_is
    elif key in PATH_KEYS:  # a folder called 2024, or a,b
        says = key == "prompt" and value[:1] == '"'  # what somebody says, with the quotes
        tries = as_it_is if QUOTED.fullmatch(value) and not says else as_text
    else:
        tries = as_it_is if value[:1] in ("'", '"', "[", "{", "(") else as_it_is + as_text
    problems = []
    for attempt in tries:
        try:
            parsed = OverridesParser.create().parse_override(attempt)
        except HydraException as error:
            problems.append(str(error).splitlines()[0])
        else:
            if not parsed.is_sweep_override():
                return attempt
            problems.append("several values")
    raise UserError(f"{override} is not understood ({problems[0]}); quote it: 'key=\"value\"'")


def quoted(text: str) -> str:
    """Text as a value in Hydra's grammar, which takes none of it for grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def _unquoted(value: str) -> str:
    """The value without quotes around it, which a shell may have left there."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _expand(override: str, config: type | None) -> list[str]:
    """`model=` and `text=` also take a name or a path: gpt2 means model=hf model.name=gpt2. Groups may be null."""
    key, equals, value = override.partition("=")
    value = _unquoted(value)
    if value == "null" and options(key, config):  # Hydra's own way to leave a group out
        return [f"~{key}"]
    if value.isdigit() and options(key, config):  # a group's alternative is a name, even where it looks like 16
        return [f"{key}='{value}'"]
    if not equals or key not in ("model", "text") or not value:
        return [override]
    if value in options(key, config):
        return [f"{key}={value}"]
    place = quoted(value)
    if key == "model":
        return ["model=hf", f"model.name={place}"]
    kind, suffixes = detect(value)
    return [f"text={kind}", f"text.path={place}", *([f"text.suffixes=[{','.join(suffixes)}]"] if suffixes else [])]


def _explain(command: str, message: str) -> str:
    """Hydra's error message as one line with the cure."""
    if found := re.search(r"Could not override '([^']+)'", message):
        key = found.group(1)
        known = [k for k, _ in _leaves(_bare(command))]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
            k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]
        ]
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {key}; {hint}`sae-dist {command} --help` lists the keys"
    if found := re.search(r"Could not find '([^/']+)/([^']+)'", message):
        group, name = found.groups()
        return f"{group}={name} is not known; choose one of {', '.join(options(group, _config(command)))}"
    if found := re.search(r"Could not find '([^']+)'", message):
        return f"{found.group(1)} is not known; `sae-dist {command} --help` lists the keys"
    return " ".join(message.split())


def _config(command: str) -> type | None:
    """The dataclass of the command's keys; None where conf/`command`.yaml has them all."""
    return getattr(importlib.import_module(f"sae_dist.cli.{command}"), "CONFIG", None)


def _prepare(command: str) -> None:
    GlobalHydra.instance().clear()
    if (config := _config(command)) is not None:
        keys.register(config)


def _bare(command: str) -> dict[str, Any]:
    _prepare(command)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose(command), resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def help_text(command: str, about: str) -> str:
    """The text of --help: what the command does, its groups, and its keys with defaults and comments."""
    text = (CONF_DIR / f"{command}.yaml").read_text(encoding="utf-8")
    groups, config = _groups(command), _config(command)
    beside = {} if config is None else keys.comments(config)
    beside |= keys.comments_of_yaml(text)
    for group, chosen in groups.items():
        if (path := CONF_DIR / group / f"{chosen}.yaml").exists():
            beside |= keys.comments_of_yaml(path.read_text(encoding="utf-8"), f"{group}.")
        elif config is not None and chosen is not None:
            beside |= keys.comments(keys.groups(config)[group][chosen], f"{group}.")
    parts = [f"usage: sae-dist {command} [key=value ...] [--cfg | --help]", about.strip()]
    if groups:
        lines = (f"  {group}={'|'.join(options(group, config))}" for group in groups)
        parts.append("Groups, and what each may be:\n" + "\n".join(lines))
    parts.append("Keys and their defaults (--cfg shows what a command line makes of them):")
    parts.append("\n".join(_described(_bare(command), beside)))
    return "\n\n".join(parts)


def _described(values: Mapping[str, Any], beside: Mapping[str, str], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """A line for every key with its value and its comment; long comments are wrapped in a column."""
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        said = beside.get(f"{prefix}{key}", "")
        shown = "" if nested else " " + yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
        line = f"{'  ' * depth}{key}:{shown}"
        first, *more = textwrap.wrap(said, 120 - max(len(line) + 2, COLUMN) - 2) or [""]
        yield f"{line:<{COLUMN - 1}} # {first}" if said else line
        yield from (f"{'':<{COLUMN - 1}} # {rest}" for rest in more)
        if nested:
            yield from _described(value, beside, f"{prefix}{key}.", depth + 1)
