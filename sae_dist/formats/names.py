"""What another tool calls the model and the hook points of a dictionary."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae_dist import public_names
from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.sae.dictionary import Dictionary


class Names(NamedTuple):
    """Names in the tool's terms: those of TransformerLens where it has one, else module paths."""

    model: str
    hook: str
    target_hook: str | None
    module_path: str | None  # of the hook point, where that is what it is called here


def names_of(
    dictionary: Dictionary, *, model_name: str | None, hook_name: str | None, hook_name_out: str | None
) -> Names:  # fmt: skip
    """The names of a dictionary, those that were given first; UserError where it has no such hook point."""
    hook, target = dictionary.info.get("hook"), dictionary.info.get("target_hook")
    if not hook:
        raise UserError(
            "the dictionary does not say its hook point, which every format needs; import it again with hook="
        )
    if hook_name_out and target is None:
        raise UserError(
            f"hook_name_out={hook_name_out} is of transcoders, and this dictionary rebuilds what it reads; leave it out"
        )
    lens = hook_names.to_lens(hook)
    out = hook_name_out or (None if target is None else hook_names.to_lens(target) or target)
    model = model_name or public_names.model_name(dictionary.info.get("model"))
    return Names(model, hook_name or lens or hook, out, hook if lens is None else None)


def refuse_unused(given: Mapping[str, str | None], named: Sequence[str], *, format: str) -> None:
    """UserError for a name that the files of a format do not say; `named` are the keys of those that they do."""
    if unused := [f"{key}={value}" for key, value in given.items() if value and key not in named]:
        takes = ", ".join(named) or "no names"
        raise UserError(f"{unused[0]} means nothing to format={format}, which takes {takes}; leave it out")
