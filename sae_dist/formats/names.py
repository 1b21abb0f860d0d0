"""What another tool calls the model and the hook points of a dictionary."""

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
    """The names of a dictionary, those that were given first; UserError where it has no hook point."""
    hook, target = dictionary.info.get("hook"), dictionary.info.get("target_hook")
    if not hook:
        raise UserError(
            "the dictionary does not say its hook point, which every format needs; import it again with hook="
        )
    lens = hook_names.to_lens(hook)
    out = hook_name_out or (None if target is None else hook_names.to_lens(target) or target)
    model = model_name or public_names.model_name(dictionary.info.get("model"))
    return Names(model, hook_name or lens or hook, out, hook if lens is None else None)
