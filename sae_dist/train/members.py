"""The dictionaries that one pass over the rows trains: the main one, and `more_dictionaries` by what differs from it.

    more_dictionaries: [{n_latents: 8192}, {k: 64, seed: 1}, {name: slow, lr: 1e-4}, {moments: int8}]

A member has its own initial weights, selection, learning rate, state and guard. Rows, their order, batch and steps are
shared, so each member is the dictionary that training it alone would give.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from sae_kernels.row_state import MomentFormat, ParameterFormat, StateOptions

from sae_dist.config import UserError, frozen, load, to_dict
from sae_dist.sae.config import KINDS, SAEConfig
from sae_dist.sae.variants.interface import TensorSpec, tensors
from sae_dist.train.schedule import base_lr

MAIN = "main"
# Keys of an entry that are not keys of `sae`.
OWN = ("name", "seed", "lr", "parameters", "moments", "start_from", "frozen")
Frozen = Literal["nothing", "decoder", "all"]  # what keeps its values of before step 0
Twin = Literal["seed", "frozen_decoder", "untrained"]
TWINS: dict[Twin, dict[str, Any]] = {"frozen_decoder": {"frozen": "decoder"}, "untrained": {"frozen": "all"}}


@frozen
class _Own:
    """The keys of an entry besides those of `sae`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]  # of a folder
    seed: int
    lr: Annotated[float, Field(gt=0)] | None
    parameters: ParameterFormat
    moments: MomentFormat
    start_from: str | None
    frozen: Frozen


class Member(NamedTuple):
    """One dictionary of a pass."""

    name: str
    sae: SAEConfig
    seed: int  # of its initial weights and roundings; the order of rows does not depend on it
    lr: float | None = None  # the peak; None: base_lr
    parameters: ParameterFormat = "float32"
    moments: MomentFormat = "float32"
    transcodes: bool = False  # what is rebuilt is not the input
    frozen: Frozen = "nothing"
    skip: bool = False  # a linear map from what is read to what is rebuilt
    cross_layer: bool = False  # latents of layer l read hook point l, and write it and all after it
    start_from: str | None = None  # where the dictionary lies that it begins from; None: it begins at random

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Of its dictionary."""
        return tensors(self.sae, transcodes=self.transcodes, skip=self.skip)

    @property
    def prefix(self) -> str:
        return prefix_of(self.name)

    def peak_lr(self, n_steps: int) -> float:
        """The learning rate after the warm-up, in a training of so many steps."""
        return self.lr or base_lr(self.sae.n_latents, n_steps)

    @property
    def state(self) -> StateOptions:
        """How its weights and moments are stored; stochastic rounding uses its seed."""
        return StateOptions(self.parameters, self.moments, self.seed)

    def folder(self, out: Path) -> Path:
        return folder(out, self.name)


def members(
    more: Sequence[Mapping[str, Any]], *, sae: SAEConfig, seed: int, lr: float | None = None,
    parameters: ParameterFormat = "float32", moments: MomentFormat = "float32", transcodes: bool = False,
    skip: bool = False, cross_layer: bool = False, start_from: str | None = None,
) -> tuple[Member, ...]:  # fmt: skip
    """The main dictionary and `more`, checked. UserError names the entry, the value and the cure."""
    main = Member(MAIN, sae, seed, lr, parameters, moments, transcodes, skip=skip, cross_layer=cross_layer)
    found = [main._replace(start_from=start_from)]
    for number, entry in enumerate(more):
        place = f"more_dictionaries.{number}"
        member = _member(place, entry, found[0])
        for other in found:
            if member.name == other.name:
                raise UserError(f"{place}: there is another dictionary named {member.name}; give it a name=")
            if member[1:] == other[1:]:
                raise UserError(
                    f"{place}={dict(entry)} is the same dictionary as {other.name}; change its n_latents, k, seed, lr "
                    "or moments, or leave it out"
                )
        found.append(member)
    return tuple(found)


def _shared(main: SAEConfig, kind: object) -> dict[str, Any]:
    """The values of the main dictionary's keys that `kind` has too; None: the same kind."""
    values = to_dict(main)
    if not isinstance(kind, str) or kind not in KINDS or kind == main.kind:
        return values
    return {key: value for key, value in values.items() if key in KINDS[kind].__dataclass_fields__}


def twin_entries(twins: Sequence[Twin], *, seed: int) -> list[dict[str, Any]]:
    """Entries of `more_dictionaries` for dictionaries that the main one is compared to.

    All begin from another seed: from the same, what is not trained would still be like the main one's beginning. So
    they begin at random where the main one begins from a dictionary.
    """
    other = {"seed": seed + 1, "start_from": None}
    return [{"name": twin_name(twin), **other, **TWINS.get(twin, {})} for twin in dict.fromkeys(twins)]


def twin_name(twin: Twin) -> str:
    return f"twin-{twin}"


def folder(out: Path, name: str) -> Path:
    """The folder of a member's finished dictionary: `out`/dictionary, or `out`/dictionaries/<name>."""
    return out / "dictionary" if name == MAIN else out / "dictionaries" / name


def prefix_of(name: str) -> str:
    """Prefix of the names of a member's metrics and tensors: 'k64/fvu'; empty for the main one."""
    return "" if name == MAIN else f"{name}/"


def split_name(name: str) -> tuple[str, str]:
    """Splits the name of a metric or tensor into its member's prefix and the rest: 'k64/W_dec' -> 'k64/', 'W_dec'."""
    head, slash, rest = name.rpartition("/")
    return head + slash, rest


def _member(place: str, entry: Mapping[str, Any], main: Member) -> Member:
    changed = {key: value for key, value in entry.items() if key != "name"}
    if not changed:
        raise UserError(
            f"{place}={dict(entry)} changes nothing; give it n_latents, k, seed, lr, moments or another key of sae"
        )
    named = "-".join(_in_name(key, value) for key, value in changed.items())
    given = {name: value for name, value in main._asdict().items() if name in OWN}
    given["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", named).strip("-.")[:100]
    try:
        own = load(_Own, given | {key: value for key, value in entry.items() if key in OWN})
        changes = {key: value for key, value in entry.items() if key not in OWN}
        sae = load(SAEConfig, _shared(main.sae, changes.get("kind")) | changes)  # type: ignore[arg-type]  a union
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    given = (own.name, sae, own.seed, own.lr, own.parameters, own.moments)
    return Member(*given, main.transcodes, own.frozen, main.skip, main.cross_layer, own.start_from)


def _in_name(key: str, value: object) -> str:
    """What an entry's key and value are in the name of its folder."""
    if key == "start_from" and isinstance(value, str):
        return f"from-{PurePosixPath(value).name}"
    return str(value) if key == "kind" else f"{key}{value}"
