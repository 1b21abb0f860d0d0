"""What other tools call a dictionary whose latents they show: the model, its layer and a set of sources."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sae_dist import public_names
from sae_dist.config import UserError
from sae_dist.formats import hook_names
from sae_dist.sae.dictionary import Dictionary

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # becomes a folder, and a part of an address
_KINDS = {"resid_pre": "res", "resid_post": "res", "attn_out": "att", "mlp_out": "mlp", "mlp_act": "mlp"}


class Source(NamedTuple):
    """One dictionary of one layer, and the text that its latents are shown on."""

    model: str
    layer: int
    set_name: str
    hook: str
    text: str
    context: int  # tokens of a prompt
    prompts: int
    description: str
    labelled_by: str | None

    @property
    def name(self) -> str:
        return f"{self.layer}-{self.set_name}"


def source_of(
    dictionary: Dictionary, config: Mapping[str, Any], *, rows: int, model_name: str | None, set_name: str | None,
    labelled_by: str | None,
) -> Source:  # fmt: skip
    """`config` is config.yaml of the run, `rows` the tokens of its feature data.

    UserError where the hook point is not of one layer, and for names that cannot be.
    """
    info, text = dictionary.info, public_names.text_name(dict(config.get("text") or {}))
    of_model = public_names.model_name(info.get("model"))
    hook = str(info.get("target_hook", info.get("hook")))
    layer = hook_names.layer(hook)
    if layer is None:
        raise UserError(f"hook={hook} is not of one layer of the model, which these tools want to know")
    model = model_name or of_model.rpartition("/")[2].lower()
    kind = "transcoder" if "target_hook" in info else _KINDS.get(hook.rpartition(".")[0], "sae")
    n = dictionary.n_latents
    chosen = set_name or f"{kind}-{n if n < 1024 else f'{n // 1024}k'}"
    for key, value in (("model_name", model), ("set_name", chosen)):
        if not _NAME.fullmatch(value):
            raise UserError(f"{key}={value} cannot be a name there; use letters, digits, '-', '_' and '.'")
    context = int((config.get("harvest") or {}).get("context") or 0) or 1
    return Source(
        model, layer, chosen, hook_names.to_lens(hook) or hook, text, context, -(-rows // context),
        f"{info.get('variant')}, {n:,} latents of {of_model} at {hook}", labelled_by,
    )  # fmt: skip
