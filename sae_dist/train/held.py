"""Which dictionary a checkpoint holds, by the keys of the training that wrote it: read off its tensors alone."""

from typing import Any

from sae_dist.config import UserError
from sae_dist.train.checkpoint import Checkpoint, layout
from sae_dist.train.member import MAIN, Member

PARAMETERS = {"float32": "float32", "bfloat16": "bfloat16_stochastic"}  # by dtype of the weights
MOMENTS = {"float32": "float32", "uint8": "int8", None: "factored"}  # by dtype of the second moment, if it is whole


def held(saved: Checkpoint, prefix: str) -> dict[str, Any]:
    """The keys of a member's dictionary that decide which tensors there are, of what shape and dtype."""
    whole = {
        name.removeprefix(prefix): layout(saved.tensors[name])
        for name in (f"{prefix}{own}" for own in ("W_dec", "second.W_dec", "threshold"))
        if name in saved.tensors
    }
    return {
        "sae.kind": "batchtopk" if "threshold" in whole else "topk",
        "sae.n_latents": whole["W_dec"].shape[0],
        "train.parameters": PARAMETERS[whole["W_dec"].dtype],
        "train.moments": MOMENTS[whole["second.W_dec"].dtype if "second.W_dec" in whole else None],
    }


def refuse_another(saved: Checkpoint, member: Member) -> None:
    """UserError where a checkpoint's dictionary of that name is another one than this member, or stored otherwise."""
    there = held(saved, member.prefix)
    here = {
        "sae.kind": member.sae.kind,
        "sae.n_latents": member.sae.n_latents,
        "train.parameters": member.parameters,
        "train.moments": member.moments,
    }
    if differing := [key for key in here if here[key] != there[key]]:
        main = member.name == MAIN
        shown = ", ".join(
            f"{key if main else key.partition('.')[2]}={there[key]} there, {here[key]} here" for key in differing
        )
        who = "" if main else f"also={member.name}: "
        raise UserError(
            f"{who}the checkpoint of step {saved.step} holds another dictionary ({shown}); give the keys that it was "
            "trained with, or choose another out= (and train.checkpoints=)"
        )
