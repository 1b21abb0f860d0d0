"""Whether an imported dictionary is right: its figures on rows of a store."""

from typing import Any

from sae_dist import storage
from sae_dist.config import UserError
from sae_dist.evaluate.heldout_rows import reconstruction_figures
from sae_dist.evaluate.reconstruction import reconstruction
from sae_dist.sae.dictionary import Dictionary
from sae_dist.service.summary import alerts
from sae_dist.shards import reader, stores
from sae_dist.shards.hooks import Hooks, check, width

ROWS = 16_384


def verify(dictionary: Dictionary, store: str) -> dict[str, Any]:
    """FVU and L0 on held-out rows of `store`; UserError where they are absurd: then the file was misunderstood."""
    rows, hook, target = stores.open(storage.open(store)), dictionary.info["hook"], dictionary.info.get("target_hook")
    hooks = Hooks((hook,), () if target is None else (target,))
    check(hooks, rows.meta, store)
    for side, names in zip((dictionary.sizes.d_in, dictionary.sizes.d_out), (hooks.sides * 2)[:2], strict=True):
        if (has := width(rows.meta, names)) != side:
            raise UserError(f"verify={store} has {has} dimensions at {'+'.join(names)}, the dictionary {side}")
    totals = reconstruction([dictionary], reader.first_heldout_pairs(rows, hooks, ROWS))
    if totals is None:
        raise UserError(f"verify={store} has no held-out rows to measure on")
    found = reconstruction_figures(totals[0])
    wrong = alerts(found)
    if (l0 := found["l0"]) is not None and l0 > dictionary.sizes.d_in:
        wrong.append(f"{l0:.4g} latents of a row are active, more than it has dimensions")
    if wrong:
        raise UserError(
            f"on {found['tokens']} rows of {store} {'; '.join(wrong)}: the file is of other activations, or means "
            "something else than was understood (scale, pre_bias, threshold_units, hook)"
        )
    return {"store": store, "tokens": found["tokens"], "fvu": found["fvu"], "l0": found["l0"]}
