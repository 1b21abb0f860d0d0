"""Other names of hook points: those of TransformerLens, and module paths of Hugging Face models.

Only names that mean the same activations have a translation; for all others a user says which one is meant.
"""

import re

LENS = {  # in blocks.L
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_act": "mlp.hook_post",
}


def from_lens(name: object) -> str | None:
    """blocks.5.hook_resid_post is resid_post.5; None for a name without a translation."""
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", str(name))
    own = next((own for own, lens in LENS.items() if match and lens == match[2]), None)
    return None if match is None or own is None else f"{own}.{match[1]}"


def to_lens(hook: str) -> str | None:
    """resid_post.5 is blocks.5.hook_resid_post; None for a module path."""
    own, _, layer = hook.rpartition(".")
    return f"blocks.{layer}.{LENS[own]}" if own in LENS else None


def from_block(path: object) -> str | None:
    """The output of block 5 (layers.5, model.layers.5, model.layers.5.output, ...) is resid_post.5; else None."""
    match = re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h|blocks)\.(\d+)(?:\.output)?", str(path))
    return f"resid_post.{match[1]}" if match else None


def from_module(path: object) -> str | None:
    """The output of a module: resid_post.L for a block's, else its path. None for an input: it has no name here."""
    text = str(path or "")
    if text.endswith(".input") or not re.fullmatch(r"\w+(\.\w+)+", text):
        return None
    return from_block(text) or text.removesuffix(".output")


def layer(hook: str) -> int | None:
    """The one layer number in a hook point's name; None where there is none or several."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", hook)
    return int(numbers[0]) if len(numbers) == 1 else None
