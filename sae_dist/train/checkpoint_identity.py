"""Which dictionaries a checkpoint holds. A training with other dictionaries must not resume from it."""

from collections.abc import Sequence
from typing import Any

from sae_dist.config import UserError
from sae_dist.train.checkpoint import Checkpoint
from sae_dist.train.members import MAIN, Member, split_name


def identity(member: Member) -> dict[str, Any]:
    """The keys of a member's dictionary that decide which tensors there are, of what shape and dtype."""
    return {
        "sae.kind": member.sae.kind,
        "sae.n_latents": member.sae.n_latents,
        "train.parameters": member.parameters,
        "train.moments": member.moments,
        "train.skip": member.skip,
        "train.cross_layer": member.cross_layer,
    }


def refuse_others(saved: Checkpoint, members: Sequence[Member]) -> None:
    """UserError where a checkpoint holds other dictionaries than `members`, or stores them in other formats."""
    there, wanted = {split_name(name)[0] for name in saved.tensors}, {member.prefix for member in members}
    if there != wanted:
        raise UserError(
            f"the checkpoint of step {saved.step} holds {len(there)} dictionaries, of which {len(there & wanted)} are "
            f"among the {len(wanted)} of this training; choose another out="
        )
    for member in members:
        _refuse_another(saved, member)


def _refuse_another(saved: Checkpoint, member: Member) -> None:
    there, here = saved.facts.get(f"{member.prefix}identity") or {}, identity(member)
    if differing := [key for key in here if here[key] != there.get(key)]:
        main = member.name == MAIN
        shown = ", ".join(
            f"{key if main else key.partition('.')[2]}={there.get(key)} there, {here[key]} here" for key in differing
        )
        who = "" if main else f"more_dictionaries={member.name}: "
        raise UserError(
            f"{who}the checkpoint of step {saved.step} holds another dictionary ({shown}); give the keys that it was "
            "trained with, or choose another out= (and train.checkpoints=)"
        )
